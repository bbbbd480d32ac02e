// The machine itself, with kernels written here by hand: what instructions compute, and planted faults, each of which
// must be named while its sound version runs.
#include <cfenv>
#include <cmath>
#include <limits>

#include "block.h"
#include "native/check.h"

namespace {

using namespace dsv4;
using namespace dsv4::machine;
using namespace dsv4::testing;

// A kernel of one parameter: %rd1 is the address of the input, %rd2 of the output; %r0 the thread, %r1 the block.
std::string kernel(const std::string& body, int max_threads = 128) {
  return ".entry k(\n.param .align 8 .b8 k_param_0[16]\n)\n.maxntid " + std::to_string(max_threads) +
         ", 1, 1\n{\n"
         ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<99>;\n.reg .f32 %f<99>;\n.reg .f64 "
         "%fd<9>;\n"
         "ld.param.u64 %rd1, [k_param_0];\nld.param.u64 %rd2, [k_param_0+8];\nmov.u32 %r0, %tid.x;\n"
         "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, dynamic_shared_memory;\n" +
         body + "\nret;\n}\n";
}

struct Shape {
  int threads = 64;
  uint32_t blocks = 1;
  bool lanes_apart = false;
};

// Runs it on words of global memory, 1024 in and 1024 out; the shared memory has 4 KB. The fault, or nothing.
std::string run_kernel(const std::string& text, Shape shape, const std::vector<uint32_t>& in,
                       std::vector<uint32_t>* out) {
  GlobalMemory memory;
  auto* input = static_cast<uint32_t*>(memory.allocate(4096));
  auto* output = static_cast<uint32_t*>(memory.allocate(4096));
  memcpy(input, in.data(), std::min(in.size(), size_t{1024}) * 4);
  const void* parameters[2] = {input, output};
  try {
    const Program program = parse(text, "k");
    Launch launch = {};
    launch.program = &program;
    launch.parameters = reinterpret_cast<const uint8_t*>(parameters);
    launch.blocks_x = shape.blocks;
    launch.blocks_y = 1;
    launch.threads = shape.threads;
    launch.shared_bytes = 4096;
    launch.apart = shape.lanes_apart ? 1 : 0;
    machine::run(launch, memory);
  } catch (const Fault& fault) {
    return fault.what();
  }
  if (out != nullptr) out->assign(output, output + 1024);
  return "";
}

std::string fault_of(const std::string& body, Shape shape = {}) {
  return run_kernel(kernel(body), shape, std::vector<uint32_t>(1024), nullptr);
}

void check_sound(const std::string& body, Shape shape = {}) {
  const std::string fault = fault_of(body, shape);
  CHECK_MESSAGE(fault.empty(), fault);
}

void check_fault(const std::string& words, const std::string& body, Shape shape = {}) {
  const std::string fault = fault_of(body, shape);
  CHECK_MESSAGE(fault.find(words) != std::string::npos, "expected '" + words + "', got '" + fault + "'");
}

// Of 32 lanes, the results of an instruction on `inputs` registers of 32 or 64 bits; text has @0 for the result and @1,
// @2 ... for the operands.
template <class R, class T>
std::vector<R> results(const std::string& text, const std::vector<std::vector<T>>& operands) {
  const auto letter = [](size_t bytes) { return bytes == 8 ? "rd" : "r"; };
  std::string body = "mul.wide.u32 %rd50, %r0, 8;\nadd.s64 %rd51, %rd1, %rd50;\nadd.s64 %rd52, %rd2, %rd50;\n";
  std::string statement = text;
  const auto name = [&](size_t number, size_t bytes) {
    const std::string place = "@" + std::to_string(number);
    const std::string reg = "%" + std::string(letter(bytes)) + std::to_string(60 + number);
    for (size_t at = statement.find(place); at != std::string::npos; at = statement.find(place)) {
      statement.replace(at, 2, reg);
    }
    return reg;
  };
  std::vector<uint32_t> in(1024);
  for (size_t n = 0; n < operands.size(); ++n) {
    for (size_t l = 0; l < 32; ++l) memcpy(&in[n * 64 + l * 2], &operands[n][l], sizeof(T));
    const std::string bits = std::to_string(8 * sizeof(T));
    body += "ld.global.b" + bits + " " + name(n + 1, sizeof(T)) + ", [%rd51+" + std::to_string(256 * n) + "];\n";
  }
  const std::string result = name(0, sizeof(R));
  body += statement + "\nst.global.b" + std::to_string(8 * sizeof(R)) + " [%rd52], " + result + ";";
  std::vector<uint32_t> out;
  Shape shape;
  shape.threads = 32;
  const std::string fault = run_kernel(kernel(body), shape, in, &out);
  CHECK_MESSAGE(fault.empty(), fault);
  std::vector<R> values(32);
  for (size_t l = 0; l < 32 && !out.empty(); ++l) memcpy(&values[l], &out[l * 2], sizeof(R));
  return values;
}

// Words of every kind: small, large, with signs, at the edges.
template <class T>
std::vector<T> words(uint64_t seed) {
  Random random(seed);
  std::vector<T> made(32);
  for (size_t l = 0; l < 32; ++l) made[l] = static_cast<T>(random.bits()) >> (l % 5 * 7);
  made[0] = 0, made[1] = static_cast<T>(-1), made[2] = std::numeric_limits<T>::min();
  made[3] = std::numeric_limits<T>::max(), made[4] = 1;
  return made;
}

std::vector<float> floats(uint64_t seed) {
  Random random(seed);
  std::vector<float> made(32);
  for (size_t l = 0; l < 32; ++l) made[l] = std::ldexp(random.uniform(-1.0f, 1.0f), static_cast<int>(l * 7 % 40) - 20);
  made[0] = 0.0f, made[1] = -0.0f, made[2] = std::numeric_limits<float>::quiet_NaN();
  made[3] = std::numeric_limits<float>::infinity(), made[4] = 1e-41f, made[5] = -made[3];
  return made;
}

template <class R, class T, class F>
void check_each(const std::string& text, const std::vector<std::vector<T>>& operands, const F& expected) {
  const std::vector<R> got = results<R, T>(text, operands);
  for (size_t l = 0; l < 32; ++l) {
    const R want = expected(l);
    CHECK_MESSAGE(memcmp(&want, &got[l], sizeof(R)) == 0 || (want != want && got[l] != got[l]),
                  text + " in lane " + std::to_string(l));
  }
}

TEST(integers_wrap_and_shift_as_ptx_says) {
  const auto a = words<int32_t>(1), b = words<int32_t>(2), c = words<int32_t>(3);
  check_each<int32_t, int32_t>("mad.lo.s32 @0, @1, @2, @3;", {a, b, c}, [&](size_t l) {
    return static_cast<int32_t>(static_cast<uint32_t>(a[l]) * static_cast<uint32_t>(b[l]) +
                                static_cast<uint32_t>(c[l]));
  });
  check_each<int64_t, int32_t>("mul.wide.s32 @0, @1, @2;", {a, b}, [&](size_t l) { return int64_t{a[l]} * b[l]; });
  check_each<int32_t, int32_t>("mul.hi.s32 @0, @1, @2;", {a, b},
                               [&](size_t l) { return static_cast<int32_t>(int64_t{a[l]} * b[l] >> 32); });
  for (const int n : {0, 5, 31, 32, 40}) {
    const std::string amount = std::to_string(n) + ";";
    check_each<int32_t, int32_t>("shr.s32 @0, @1, " + amount, {a}, [&](size_t l) { return a[l] >> std::min(n, 31); });
    check_each<uint32_t, int32_t>("shr.u32 @0, @1, " + amount, {a},
                                  [&](size_t l) { return n > 31 ? 0u : static_cast<uint32_t>(a[l]) >> n; });
    check_each<uint32_t, int32_t>("shl.b32 @0, @1, " + amount, {a},
                                  [&](size_t l) { return n > 31 ? 0u : static_cast<uint32_t>(a[l]) << n; });
  }
  auto divisor = b;
  for (int32_t& d : divisor) d = d == 0 ? 3 : d;
  check_each<int32_t, int32_t>("div.s32 @0, @1, @2;", {a, divisor},
                               [&](size_t l) { return static_cast<int32_t>(int64_t{a[l]} / divisor[l]); });
  check_each<int32_t, int32_t>("rem.s32 @0, @1, @2;", {a, divisor},
                               [&](size_t l) { return static_cast<int32_t>(int64_t{a[l]} % divisor[l]); });
  check_each<uint32_t, int32_t>("min.u32 @0, @1, @2;", {a, b}, [&](size_t l) {
    return std::min(static_cast<uint32_t>(a[l]), static_cast<uint32_t>(b[l]));
  });
  check_each<uint32_t, int32_t>("popc.b32 @0, @1;", {a}, [&](size_t l) {
    uint32_t bits = 0;
    for (int n = 0; n < 32; ++n) bits += static_cast<uint32_t>(a[l]) >> n & 1u;
    return bits;
  });
  const auto wide = words<int64_t>(4);
  check_each<int64_t, int64_t>("shr.s64 @0, @1, 63;", {wide}, [&](size_t l) { return wide[l] < 0 ? -1 : 0; });
  check_each<int32_t, int64_t>("cvt.u32.u64 @0, @1;", {wide}, [&](size_t l) { return static_cast<int32_t>(wide[l]); });
  check_each<int64_t, int32_t>("cvt.s64.s32 @0, @1;", {a}, [&](size_t l) { return int64_t{a[l]}; });
}

TEST(bytes_and_fields_are_moved) {
  const auto a = words<uint32_t>(5), b = words<uint32_t>(6), s = words<uint32_t>(7);
  check_each<uint32_t, uint32_t>("prmt.b32 @0, @1, @2, @3;", {a, b, s}, [&](size_t l) {
    uint32_t out = 0;
    for (uint32_t n = 0; n < 4; ++n) {
      const uint32_t nibble = s[l] >> (4 * n) & 15u, source = (nibble & 7u) < 4 ? a[l] : b[l];
      uint32_t byte = source >> (8 * (nibble & 3u)) & 0xFFu;
      if (nibble > 7) byte = byte > 127 ? 255 : 0;
      out |= byte << (8 * n);
    }
    return out;
  });
  check_each<uint32_t, uint32_t>("bfi.b32 @0, @1, @2, 8, 5;", {a, b},
                                 [&](size_t l) { return (b[l] & ~0x1F00u) | (a[l] & 0x1Fu) << 8; });
  check_each<uint32_t, uint32_t>("bfi.b32 @0, @1, @2, 0, 32;", {a, b}, [&](size_t l) { return a[l]; });
  check_each<uint64_t, uint32_t>("mov.b64 @0, {@1, @2};", {a, b},
                                 [&](size_t l) { return static_cast<uint64_t>(b[l]) << 32 | a[l]; });
}

TEST(floats_round_as_ptx_says) {
  const auto a = floats(8), b = floats(9), c = floats(10);
  const std::vector<std::vector<float>> three = {a, b, c}, two = {a, b};
  check_each<float, float>("fma.rn.f32 @0, @1, @2, @3;", three, [&](size_t l) { return std::fma(a[l], b[l], c[l]); });
  const auto in_mode = [](int mode, auto compute) {
    const int before = std::fegetround();
    std::fesetround(mode);
    const volatile float value = compute();
    std::fesetround(before);
    return static_cast<float>(value);
  };
  check_each<float, float>("fma.rm.f32 @0, @1, @2, @3;", three, [&](size_t l) {
    const volatile float x = a[l], y = b[l], z = c[l];
    return in_mode(FE_DOWNWARD, [&] { return std::fma(x, y, z); });
  });
  check_each<float, float>("add.rz.f32 @0, @1, @2;", two, [&](size_t l) {
    const volatile float x = a[l], y = b[l];
    return in_mode(FE_TOWARDZERO, [&] { return x + y; });
  });
  check_each<float, float>("cvt.sat.f32.f32 @0, @1;", {a},
                           [&](size_t l) { return a[l] > 0 ? std::min(a[l], 1.0f) : 0.0f; });
  check_each<int32_t, float>("cvt.rzi.s32.f32 @0, @1;", {a}, [&](size_t l) {
    if (a[l] != a[l]) return 0;
    return std::isinf(a[l]) ? (a[l] > 0 ? INT32_MAX : INT32_MIN) : static_cast<int32_t>(a[l]);
  });
  check_each<float, float>("max.f32 @0, @1, @2;", two, [&](size_t l) {
    return a[l] == b[l] ? (std::signbit(a[l]) ? b[l] : a[l]) : std::fmax(a[l], b[l]);
  });
  for (const char* name : {"eq", "ne", "lt", "leu", "geu", "neu", "nan"}) {
    const std::string test = name;
    check_each<uint32_t, float>("setp." + test + ".f32 %p1, @1, @2;\nselp.b32 @0, 1, 0, %p1;", two, [&](size_t l) {
      const bool unordered = a[l] != a[l] || b[l] != b[l];
      const bool holds = test == "eq"    ? a[l] == b[l]
                         : test == "ne"  ? !unordered && a[l] != b[l]
                         : test == "lt"  ? a[l] < b[l]
                         : test == "leu" ? unordered || a[l] <= b[l]
                         : test == "geu" ? unordered || a[l] >= b[l]
                         : test == "neu" ? unordered || a[l] != b[l]
                                         : unordered;
      return holds ? 1u : 0u;
    });
  }
}

// What a lane's thread writes to its own word of the output.
const std::string kMine = "mul.wide.u32 %rd3, %r0, 4;\nadd.s64 %rd4, %rd2, %rd3;\n";
// %r3: the thread's own word of the shared memory; %r4: that of the thread 32 further on, of 64; %r5: of the next lane.
const std::string kWords =
    "shl.b32 %r10, %r0, 2;\nadd.s32 %r3, %r2, %r10;\nxor.b32 %r11, %r10, 128;\nadd.s32 %r4, %r2, %r11;\n"
    "xor.b32 %r12, %r10, 4;\nadd.s32 %r5, %r2, %r12;\n";

TEST(branches_part_and_meet_again) {
  // Lanes loop as often as their number says, and meet at the shuffle.
  const std::string body =
      kMine +
      "and.b32 %r20, %r0, 31;\nmov.u32 %r21, 0;\n$top:\nsetp.eq.s32 %p1, %r20, 0;\n@%p1 bra $end;\n"
      "add.s32 %r21, %r21, %r20;\nsub.s32 %r20, %r20, 1;\nbra.uni $top;\n$end:\n"
      "mov.u32 %r22, 1;\nmov.u32 %r23, 31;\nmov.u32 %r24, -1;\n"
      "shfl.sync.bfly.b32 %r25|%p2, %r21, %r22, %r23, %r24;\nst.global.u32 [%rd4], %r25;";
  for (const bool apart : {false, true}) {
    std::vector<uint32_t> out;
    Shape shape;
    shape.lanes_apart = apart;
    const std::string fault = run_kernel(kernel(body), shape, std::vector<uint32_t>(1024), &out);
    CHECK_MESSAGE(fault.empty(), fault);
    for (uint32_t t = 0; t < 64 && !out.empty(); ++t) CHECK(out[t] == (t % 32 ^ 1) * ((t % 32 ^ 1) + 1) / 2);
  }
  check_fault("elsewhere or have ended",
              "setp.eq.s32 %p1, %r0, 5;\n@%p1 bra $end;\nbar.sync 0;\nbra.uni $end;\n$end:\n");
  check_fault("elsewhere or have ended", "setp.eq.s32 %p1, %r0, 5;\n@%p1 ret;\nbar.warp.sync -1;\n");
  check_fault("a predicate", "setp.eq.s32 %p1, %r0, 5;\n@%p1 bar.sync 0;\n");
}

TEST(races_in_shared_memory) {
  const std::string store = kWords + "st.shared.u32 [%r3], %r0;\n", load = "ld.shared.u32 %r6, [%r4];\n";
  check_sound(store + "bar.sync 0;\n" + load + "bar.sync 0;\n" + store);
  check_fault("race: ", store + "bar.sync 0;\n" + load + store);
  check_fault("race: two warps write", "st.shared.u32 [%r2], %r0;\n");
  const std::string copy =
      "shl.b32 %r13, %r0, 4;\nadd.s32 %r14, %r2, %r13;\nmov.u32 %r15, 16;\n"
      "cp.async.cg.shared.global.L2::128B [%r14], [%rd1], 16, %r15;\ncp.async.commit_group;\ncp.async.wait_group 0;\n";
  // Of the thread that is 32 further on.
  const std::string other = "xor.b32 %r16, %r13, 512;\nadd.s32 %r17, %r2, %r16;\nld.shared.u32 %r6, [%r17];\n";
  check_sound(copy + "bar.sync 0;\n" + other);
  check_fault("race: ", copy + "bar.sync 0;\n" + other + copy);
}

TEST(barriers) {
  const std::string store = kWords + "st.shared.u32 [%r3], %r0;\n", load = "ld.shared.u32 %r6, [%r4];\n";
  check_sound(store + "bar.sync 0;\n" + load);
  check_fault("nothing has written", store + load);
  check_fault("do not come", "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:\n");
  check_sound("bar.sync 1, 64;\n");
  check_fault(
      "two sizes",
      "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $more;\nbar.sync 1, 64;\nbra.uni $end;\n$more:\nbar.sync 1, 96;\n$end:\n");
  Shape apart;
  apart.lanes_apart = true;
  check_sound(store + "bar.warp.sync -1;\nld.shared.u32 %r6, [%r5];\n", apart);
  check_fault("nothing has written", store + "ld.shared.u32 %r6, [%r5];\n", apart);
  check_fault("not all lanes", "bar.warp.sync 15;\n");
}

TEST(shared_memory) {
  check_fault("misaligned", "st.shared.u32 [%r2+2], %r0;");
  check_fault("misaligned", "st.shared.v4.b32 [%r2+8], {%r0, %r0, %r0, %r0};");
  Shape warp;
  warp.threads = 32;
  check_sound("st.shared.v2.b32 [%r2+8], {%r0, %r0};", warp);
  check_sound("st.shared.u32 [%r2+4092], %r0;", warp);
  check_fault("outside of the shared memory", "st.shared.u32 [%r2+4096], %r0;");
  check_fault("outside of the shared memory", "st.shared.u32 [%r2+-4], %r0;");
  check_fault("nothing has written", "ld.shared.u32 %r3, [%r2];");
}

TEST(global_memory) {
  const std::string address = kMine;
  check_sound(address + "st.global.u32 [%rd4+3840], %r0;");
  check_fault("outside of every allocation", address + "st.global.u32 [%rd4+3844], %r0;");
  check_fault("outside of every allocation", address + "ld.global.u32 %r3, [%rd2+-4];");
  check_fault("misaligned", address + "ld.global.v2.u32 {%r3, %r4}, [%rd2+4];");
  check_fault("outside of the kernel's parameters", "ld.param.u64 %rd3, [k_param_0+16];");
}

TEST(races_in_global_memory) {
  Shape blocks;
  blocks.blocks = 2;
  check_fault("two write the same byte", kMine + "st.global.u32 [%rd4], %r0;", blocks);
  const std::string per_block = kMine + "mul.wide.u32 %rd5, %r1, 256;\nadd.s64 %rd6, %rd4, %rd5;\n";
  check_sound(per_block + "st.global.u32 [%rd6], %r0;", blocks);
  check_sound("ld.global.u32 %r3, [%rd2];", blocks);
  check_fault("race", per_block + "st.global.u32 [%rd6], %r0;\nld.global.u32 %r3, [%rd2];", blocks);

  const std::string store = kMine + "st.global.u32 [%rd4], %r0;\n";
  const std::string load =
      "xor.b32 %r3, %r0, 32;\nmul.wide.u32 %rd7, %r3, 4;\nadd.s64 %rd8, %rd2, %rd7;\n"
      "ld.global.u32 %r4, [%rd8];\n";
  check_sound(store + "bar.sync 0;\n" + load);
  check_fault("race", store + load);
  check_fault("race", store + "bar.sync 0;\n" + load + store);
  check_sound(store + "bar.sync 0;\n" + load + "bar.sync 0;\n" + store);
}

TEST(asynchronous_copies) {
  const std::string copy =
      "shl.b32 %r10, %r0, 4;\nadd.s32 %r3, %r2, %r10;\nmov.u32 %r11, 16;\n"
      "cp.async.cg.shared.global.L2::128B [%r3], [%rd1], 16, %r11;\ncp.async.commit_group;\n";
  const std::string second =
      "cp.async.cg.shared.global.L2::128B [%r3+2048], [%rd1], 16, %r11;\ncp.async.commit_group;\n";
  check_sound(copy + "cp.async.wait_group 0;\nld.shared.u32 %r4, [%r3];");
  check_fault("still to write", copy + "ld.shared.u32 %r4, [%r3];");
  check_fault("still to write", copy + "st.shared.u32 [%r3], %r0;");
  check_sound(copy + second + "cp.async.wait_group 1;\nld.shared.u32 %r4, [%r3];");
  check_fault("still to write", copy + second + "cp.async.wait_group 1;\nld.shared.u32 %r4, [%r3+2048];");
  check_fault("still to write",
              "mov.u32 %r11, 16;\nshl.b32 %r10, %r0, 4;\nadd.s32 %r3, %r2, %r10;\n"
              "cp.async.cg.shared.global.L2::128B [%r3], [%rd1], 16, %r11;\n"
              "cp.async.wait_group 0;\nld.shared.u32 %r4, [%r3];");  // never committed
  check_fault("part of 16 bytes", "mov.u32 %r11, 8;\ncp.async.cg.shared.global.L2::128B [%r2], [%rd1], 16, %r11;");
}

// a is all of one value, b has 1 and then 2^-25 in each column: a sum of exact products would keep the small ones.
TEST(tensor_cores_cut_off) {
  const auto product = [](const char* a, const char* low, const char* high, float sum) {
    std::string body = kMine;
    for (int r = 20; r < 24; ++r) body += "mov.u32 %r" + std::to_string(r) + ", " + a + ";\n";
    body += "mov.u32 %r24, " + std::string(low) + ";\nmov.u32 %r25, " + high + ";\n";
    uint32_t bits;
    memcpy(&bits, &sum, sizeof(bits));
    for (int r = 20; r < 24; ++r) body += "mov.b32 %f" + std::to_string(r) + ", " + std::to_string(bits) + ";\n";
    body +=
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f20, %f21, %f22, %f23}, {%r20, %r21, %r22, %r23}, "
        "{%r24, %r25}, {%f20, %f21, %f22, %f23};\nst.global.f32 [%rd4], %f23;";
    std::vector<uint32_t> out;
    Shape shape;
    shape.threads = 32;
    const std::string fault = run_kernel(kernel(body), shape, std::vector<uint32_t>(1024), &out);
    CHECK_MESSAGE(fault.empty(), fault);
    float value;
    memcpy(&value, &out[0], sizeof(value));
    return value;
  };
  CHECK(product("0x3F803F80", "0x3F803F80", "0x3F803F80", 0.5f) == 16.5f);
  CHECK(product("0x3F803F80", "0x3F803F80", "0x40004000", 0.0f) == 24.0f);
  // Eight times 2^-25 beside a one: each cut off, and exactly 1 + 2^-22 if it were not.
  CHECK(product("0x3F803F80", "0x33003300", "0x00000000", 1.0f) == 1.0f);
  CHECK(product("0x3F803F80", "0x33003300", "0x00000000", 0.0f) == 0x1p-22f);
  // 1 + 2^-24 eight times has its bits, of which the result keeps 24, cut off.
  CHECK(product("0x3F803F80", "0x33803380", "0x00000000", 1.0f) == 1.0f + 0x1p-21f);
  CHECK(product("0x3F803F80", "0x33803380", "0x00000000", 2.0f) == 2.0f);
  CHECK(std::isnan(product("0x7F807F80", "0x00000000", "0x3F803F80", 0.0f)));
}

// Of a matrix of ones [8, 16] in shared memory, times rows of threes, in the steps of a kernel.
TEST(products_of_warpgroups) {
  const std::string fill =
      "shl.b32 %r10, %r0, 4;\nadd.s32 %r3, %r2, %r10;\nmov.u32 %r11, 0x3F803F80;\n"
      "st.shared.v4.b32 [%r3], {%r11, %r11, %r11, %r11};\n";
  const std::string visible = "fence.proxy.async.shared::cta;\nbar.sync 0;\n";
  // Start 1024 (>> 4), eight rows of 1024 bytes apart, swizzled by 128 bytes.
  std::string operands = "mov.u64 %rd9, 0x4000004000000040;\n";
  for (int r = 20; r < 24; ++r) operands += "mov.u32 %r" + std::to_string(r) + ", 0x40404040;\n";
  for (int r = 20; r < 24; ++r) operands += "mov.f32 %f" + std::to_string(r) + ", 0f3F000000;\n";
  const std::string fence = "wgmma.fence.sync.aligned;\n";
  const std::string start =
      "{ .reg .pred %adds; setp.ne.b32 %adds, 1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%f20, %f21, %f22, %f23}, {%r20, %r21, %r22, %r23}, %rd9, %adds, 1, 1, 0; }\n";
  const std::string commit = "wgmma.commit_group.sync.aligned;\n", wait = "wgmma.wait_group.sync.aligned 0;\n";
  const std::string out = kMine + "st.global.f32 [%rd4], %f23;\n";
  Shape group;
  group.threads = 128;
  const auto value = [&](const std::string& body) {
    std::vector<uint32_t> words;
    const std::string fault = run_kernel(kernel(body), group, std::vector<uint32_t>(1024), &words);
    CHECK_MESSAGE(fault.empty(), fault);
    float first = 0;
    if (!words.empty()) memcpy(&first, words.data(), sizeof(first));
    return first;
  };
  CHECK(value(fill + visible + operands + fence + start + commit + wait + out) == 48.5f);
  CHECK(value(fill + visible + operands + fence + start + commit + out + wait) == 0.5f);  // not there yet
  CHECK(value(fill + visible + operands + fence + start + wait + out) == 0.5f);           // in no group
  check_fault("a fence of its registers", fill + visible + operands + start + commit + wait, group);
  check_fault("a fence of its registers", fill + visible + fence + operands + start + commit + wait, group);
  check_fault("is not fenced", fill + "bar.sync 0;\n" + operands + fence + start + commit + wait, group);
  check_fault("is not fenced", visible + operands + fence + start + commit + wait, group);
  check_fault("still reads", fill + visible + operands + fence + start + commit + fill + wait, group);
  check_sound(fill + visible + operands + fence + start + commit + wait + "bar.sync 0;\n" + fill, group);
  check_fault("is not swizzled by 128 bytes",
              fill + visible + operands + "mov.u64 %rd9, 0x8000004000000040;\n" + fence + start + commit + wait, group);
}

TEST(what_a_machine_cannot_run_is_named) {
  check_fault("unknown instruction: frobnicate.u32 %r3, %r0", "frobnicate.u32 %r3, %r0;");
  check_fault("unknown register %q1", "mov.u32 %r3, %q1;");
  check_fault("no label $nowhere", "bra $nowhere;");
  Shape large;
  large.threads = 160;
  check_fault("is compiled for 128 threads a block, not for 160", "", large);
  Shape part;
  part.threads = 40;
  check_fault("a part of a warp", "", part);
  CHECK(fault_of("st.shared.u32 [%r2+2], %r0;").find("k, block 0, 0: warp ") == 0);
}

}  // namespace
