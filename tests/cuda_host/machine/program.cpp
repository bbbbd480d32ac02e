#include "program.h"

#include <cstring>
#include <map>
#include <unordered_map>
#include <unordered_set>

#include "instructions.h"

namespace dsv4::machine {

namespace {

using Text = std::string_view;

Text trim(Text text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == Text::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

// Takes what stands before the separator off the front.
Text cut(Text& text, Text separators) {
  const size_t end = text.find_first_of(separators);
  const Text first = text.substr(0, end);
  text = end == Text::npos ? Text() : text.substr(end + 1);
  return trim(first);
}

int64_t integer(Text text) {
  const std::string digits(text);
  char* end = nullptr;
  const int64_t value = text.front() == '-' ? std::strtoll(digits.c_str(), &end, 0)
                                            : static_cast<int64_t>(std::strtoull(digits.c_str(), &end, 0));
  if (end != digits.c_str() + digits.size()) throw Fault("not a number: " + digits);
  return value;
}

// Of a type's name, such as b32; 4 if it names none.
int type_bytes(Text type) {
  const Text digits = type.substr(type.empty() ? 0 : 1);
  if (digits.empty() || digits.find_first_not_of("0123456789") != Text::npos) return 4;
  return static_cast<int>(integer(digits) / 8);
}

class Parser {
 public:
  Parser(Text module, const std::string& entry) : module_(module) {
    program_.name = entry;
    program_.thread = reserve(4);
    program_.block_x = reserve(4);
    program_.block_y = reserve(4);
  }

  Program run() {
    read_files();
    const size_t start = module_.find(".entry " + program_.name + "(");
    if (start == Text::npos) throw Fault("no entry " + program_.name);
    const size_t body = module_.find("\n{", start), end = module_.find("\n}", body);
    read_head(module_.substr(start, body - start));
    read_body(module_.substr(body + 2, end - body - 2));
    for (auto& [instruction, label] : jumps_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw Fault("no label " + std::string(label));
      program_.code[instruction].target = found->second;
    }
    const auto leaves = [](const Instruction& i) {
      return !i.guarded && (i.kind == Kind::kExit || i.kind == Kind::kBranch);
    };
    if (program_.code.empty() || !leaves(program_.code.back())) throw Fault("runs past its end");
    mark_operands();
    return std::move(program_);
  }

 private:
  Slot reserve(int bytes) {
    const Slot slot = static_cast<Slot>(program_.register_bytes);
    program_.register_bytes += (static_cast<size_t>(bytes) * kLanes + 63) / 64 * 64;
    return slot;
  }

  // .file NUMBER "PATH"
  void read_files() {
    for (size_t at = module_.find("\n\t.file"); at != Text::npos; at = module_.find("\n\t.file", at + 1)) {
      Text line = module_.substr(at + 7, module_.find('\n', at + 1) - at - 7);
      const size_t quote = line.find('"');
      const auto number = static_cast<size_t>(integer(trim(line.substr(0, quote))));
      line = line.substr(quote + 1, line.find('"', quote + 1) - quote - 1);
      if (program_.files.size() <= number) program_.files.resize(number + 1);
      program_.files[number] = std::string(line.substr(line.rfind('/') + 1));
    }
  }

  void read_head(Text head) {
    const size_t size = head.find("_param_0[");
    if (size != Text::npos) {
      const Text rest = head.substr(size + 9);
      program_.parameter_bytes = static_cast<int>(integer(rest.substr(0, rest.find(']'))));
    }
    if (head.find("_param_1") != Text::npos) throw Fault("more than one parameter");
    const size_t limit = head.find(".maxntid ");
    if (limit != Text::npos) {
      Text rest = head.substr(limit + 9);
      program_.max_threads = static_cast<int>(integer(cut(rest, ",\n")));
    }
  }

  void read_body(Text body) {
    while (!(body = trim(body)).empty()) {
      if (body.substr(0, 2) == "//") {
        cut(body, "\n");
      } else if (body.substr(0, 4) == ".loc") {
        Text line = cut(body, "\n").substr(5);
        file_ = static_cast<int>(integer(cut(line, " \t")));
        line_ = static_cast<int>(integer(cut(line, " \t,")));
      } else if (body.front() == '{' || body.front() == '}') {
        body = body.substr(1);  // of registers that one statement declares for itself
      } else if (body.front() == '$') {
        labels_[cut(body, ":")] = static_cast<int>(program_.code.size());
      } else {
        read_statement(cut(body, ";"));
      }
    }
  }

  void read_statement(Text statement) {
    const Text whole = statement;
    if (statement.substr(0, 5) == ".reg ") {
      statement = trim(statement.substr(5));
      const int bytes = type_bytes(cut(statement, " \t").substr(1));
      const size_t count = statement.find('<');
      if (count == Text::npos) {
        slots_[trim(statement)] = reserve(bytes);
      } else {
        register_bytes_[statement.substr(0, count)] = bytes;
      }
      return;
    }
    if (statement.substr(0, 7) == ".pragma") return;
    if (statement.front() == '.') throw Fault("unknown directive: " + std::string(whole));

    Instruction instruction;
    instruction.text = whole;
    instruction.source_file = file_;
    instruction.source_line = line_;
    if (statement.front() == '@') {
      Text predicate = cut(statement, " \t").substr(1);
      instruction.guarded = true;
      instruction.unless = predicate.front() == '!';
      instruction.predicate = slot_of(predicate.substr(instruction.unless ? 1 : 0));
      statement = trim(statement);
    }
    const std::string name(cut(statement, " \t"));
    std::string known = name;
    if (name == "mov.b64" || name == "mov.b32") known += statement.find('{') == Text::npos ? "" : pieces(statement);
    const auto found = operations().find(known);
    if (found == operations().end()) throw Fault("unknown instruction: " + std::string(whole));
    instruction.execute = found->second.execute;
    instruction.kind = found->second.kind;
    if (instruction.kind == Kind::kBranch) {
      jumps_.emplace_back(program_.code.size(), trim(statement));
    } else {
      read_operands(name, trim(statement), &instruction);
    }
    for (const char* kind :
         {"bar.", "cp.async.commit", "cp.async.wait", "fence.", "wgmma.fence", "wgmma.commit", "wgmma.wait"}) {
      instruction.synchronises = instruction.synchronises || name.compare(0, strlen(kind), kind) == 0;
    }
    program_.async_proxy = program_.async_proxy || name.compare(0, 6, "wgmma.") == 0;
    program_.code.push_back(std::move(instruction));
  }

  // A move that takes a register apart or puts it together.
  static std::string pieces(Text operands) { return operands.front() == '{' ? ".split" : ".join"; }

  // What writes a register that a product of warpgroups takes must be fenced from it.
  void mark_operands() {
    std::unordered_set<Slot> operands;
    for (const Instruction& i : program_.code) {
      if (!is_product(i)) continue;
      operands.insert(i.out.begin(), i.out.end());
      operands.insert(i.in.begin(), i.in.begin() + 4);
    }
    for (Instruction& i : program_.code) {
      for (const Slot slot : i.out)
        i.writes_operands = i.writes_operands || (!is_product(i) && operands.count(slot) != 0);
    }
  }
  static bool is_product(const Instruction& i) { return i.text.substr(0, 14) == "wgmma.mma_asyn"; }

  void read_operands(const std::string& name, Text operands, Instruction* instruction) {
    const Text type = Text(name).substr(name.rfind('.') + 1);
    instruction->bytes = type_bytes(type);
    const bool results = name.compare(0, 2, "st") != 0 && name.compare(0, 3, "cp.") != 0 &&
                         name.compare(0, 4, "bar.") != 0 && name.compare(0, 6, "fence.") != 0 &&
                         name.compare(0, 10, "wgmma.wait") != 0 && name != "ret";
    int number = 0, addresses = 0;
    while (!(operands = trim(operands)).empty()) {
      const bool output = results && number == 0;
      if (operands.front() == '{') {
        Text vector = operands.substr(1, operands.find('}') - 1);
        operands = operands.substr(operands.find('}') + 1);
        cut(operands, ",");
        const int bytes = type_bytes(type) / (name.compare(0, 3, "mov") == 0 ? 2 : 1);
        while (!vector.empty()) add(instruction, cut(vector, ","), output, bytes);
      } else if (operands.front() == '[') {
        Text address = operands.substr(1, operands.find(']') - 1);
        operands = operands.substr(operands.find(']') + 1);
        cut(operands, ",");
        if (addresses == 2) throw Fault("three addresses: " + std::string(instruction->text));
        const Text base = cut(address, "+");
        if (!address.empty()) instruction->offset[addresses] = integer(address);
        add(instruction, base, false, addresses == 0 && name.find(".shared") != std::string::npos ? 4 : 8);
        ++addresses;
      } else {
        Text operand = cut(operands, ",");
        Text first = cut(operand, "|");
        add(instruction, first, output, constant_bytes(name, number, instruction->bytes));
        if (!operand.empty()) add(instruction, operand, output, 4);
      }
      ++number;
    }
  }

  // The width that an operand has if it is a constant.
  static int constant_bytes(const std::string& name, int number, int type) {
    const bool amount =
        (name.compare(0, 2, "sh") == 0 && number == 2) || (name.compare(0, 3, "bfi") == 0 && number > 2);
    return amount ? 4 : type;
  }

  void add(Instruction* instruction, Text operand, bool output, int bytes) {
    const Slot slot = operand.front() == '%' ? slot_of(operand) : constant(operand, bytes, instruction->text);
    const auto wide = operand.front() == '%' ? width(operand) : static_cast<uint8_t>(bytes);
    if (output) {
      if (instruction->out.empty()) instruction->out_bytes = wide;
      instruction->out.push_back(slot);
    } else {
      instruction->in_bytes.push_back(wide);
      instruction->in.push_back(slot);
    }
  }

  uint8_t width(Text name) const {
    const size_t digit = name.find_first_of("0123456789");
    const auto found = register_bytes_.find(name.substr(0, digit));
    return found == register_bytes_.end() ? uint8_t{4} : static_cast<uint8_t>(found->second);
  }

  Slot slot_of(Text name) {
    if (name == "%tid.x") return program_.thread;
    if (name == "%ctaid.x") return program_.block_x;
    if (name == "%ctaid.y") return program_.block_y;
    const auto found = slots_.find(name);
    if (found != slots_.end()) return found->second;
    const size_t digit = name.find_first_of("0123456789");
    if (digit == Text::npos || register_bytes_.count(name.substr(0, digit)) == 0) {
      throw Fault("unknown register " + std::string(name));
    }
    return slots_[name] = reserve(width(name));
  }

  Slot constant(Text operand, int bytes, Text statement) {
    uint64_t bits = 0;
    if (operand.find("dynamic_shared_memory") != Text::npos) {
      bits = kSharedBase;
    } else if (operand.find("_param_0") != Text::npos) {
      bits = 0;  // parameters are counted from their own start
    } else if (operand.substr(0, 2) == "0f" || operand.substr(0, 2) == "0d") {
      bits = std::stoull(std::string(operand.substr(2)), nullptr, 16);
    } else if (operand.find_first_not_of("-0123456789abcdefxABCDEFU") == Text::npos) {
      bits = static_cast<uint64_t>(integer(operand));
      if (statement.find("mov.pred") != Text::npos && bits != 0) bits = ~uint64_t{0};  // of every lane
    } else {
      throw Fault("unknown operand " + std::string(operand) + " of " + std::string(statement));
    }
    const auto key = std::make_pair(bits, bytes);
    const auto found = constants_.find(key);
    if (found != constants_.end()) return found->second;
    const Slot slot = reserve(bytes);
    program_.constants.push_back({slot, bytes, bits});
    return constants_[key] = slot;
  }

  Text module_;
  Program program_;
  std::unordered_map<Text, int> register_bytes_, labels_;
  std::unordered_map<Text, Slot> slots_;
  std::map<std::pair<uint64_t, int>, Slot> constants_;
  std::vector<std::pair<size_t, Text>> jumps_;
  int file_ = -1, line_ = 0;
};

}  // namespace

Program parse(std::string_view module, const std::string& entry) { return Parser(module, entry).run(); }

std::string Program::where(const Instruction& instruction) const {
  std::string place = "\"" + std::string(instruction.text) + "\"";
  if (instruction.source_file >= 0 && static_cast<size_t>(instruction.source_file) < files.size()) {
    place +=
        " of " + files[static_cast<size_t>(instruction.source_file)] + ":" + std::to_string(instruction.source_line);
  }
  return place;
}

const Operations& operations() {
  static const Operations all = [] {
    Operations made;
    add_arithmetic(made);
    add_conversions(made);
    add_memory(made);
    add_collectives(made);
    add_warpgroups(made);
    return made;
  }();
  return all;
}

}  // namespace dsv4::machine
