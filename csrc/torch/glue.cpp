#include "torch/glue.h"

#include <algorithm>
#include <stdexcept>

#include "common/hardware.h"

#if defined(DSV4_TORCH_CUDA) && !defined(DSV4_HOST_MODEL)
// Present in CUDA builds of torch only; weak, so that this library loads everywhere.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace dsv4::binding {
namespace {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e8m0fnu:
      return "float8_e8m0fnu";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes, std::initializer_list<const char*> labels = {}) {
  std::string text = "[";
  auto label = labels.begin();
  for (const int64_t size : sizes) {
    const char* named = label == labels.end() ? nullptr : *label++;
    if (text.size() > 1) text += ", ";
    text += named != nullptr ? named : size == kAny ? "*" : std::to_string(size);
  }
  return text + "]";
}

bool is_one_of(ScalarType dtype, std::initializer_list<ScalarType> dtypes) {
  for (const ScalarType one : dtypes) {
    if (one == dtype) return true;
  }
  return false;
}

std::string dtypes_text(std::initializer_list<ScalarType> dtypes, const char* words) {
  if (words != nullptr) return words;
  std::string text;
  for (const ScalarType dtype : dtypes) text += (text.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  return text;
}

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

// torch takes None for a tensor and passes on an undefined one.
torch::headeronly::IntHeaderOnlyArrayRef sizes_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.sizes() : torch::headeronly::IntHeaderOnlyArrayRef();
}

std::string described(const Tensor& tensor) {
  if (!tensor.defined()) return "None";
  return std::string(dtype_name(tensor.scalar_type())) + " " + shape_text(tensor.sizes());
}

Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& device_of) {
  constexpr size_t kMostAxes = 8;
  if (sizes.size() > kMostAxes) return torch::stable::empty(sizes, dtype, std::nullopt, device_of.device());
  // Not through the dispatcher by name, as torch::stable::empty goes: a short op would spend half its time there.
  int64_t strides[kMostAxes], step = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = step;
    step *= std::max<int64_t>(sizes[axis], 1);
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_of.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(device_of.get(), &device_index));
  AtenTensorHandle made = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &made);
  if (error != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("dsv4: no memory for " + std::string(dtype_name(dtype)) + " " + shape_text(sizes) +
                             "; pass fewer rows at once");
  }
  return Tensor(made);
}

#if !defined(DSV4_TORCH_CUDA)
void torch_parallel_for(void*, int64_t count, void (*body)(void* argument, int64_t begin, int64_t end),
                        void* argument) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(argument, begin, end); });
}
#endif

}  // namespace

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      return DType::kNone;
  }
}

std::vector<int64_t> Check::tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                                   std::initializer_list<ScalarType> dtypes, const Words& words) {
  const auto actual = sizes_of(tensor);
  bool fits = tensor.defined() && actual.size() == sizes.size();
  for (size_t axis = 0; fits && axis < sizes.size(); ++axis) {
    fits = sizes.begin()[axis] == kAny || sizes.begin()[axis] == actual[axis];
  }
  if (!fits || !is_one_of(tensor.scalar_type(), dtypes)) {
    refuse(name, tensor, dtypes, words.dtypes, shape_text(sizes, words.axes));
  }
  same_device(name, tensor);
  return std::vector<int64_t>(actual.begin(), actual.end());
}

std::vector<int64_t> Check::rows(const char* name, const Tensor& tensor, const char* label,
                                 std::initializer_list<ScalarType> dtypes, const char* dtype_words, size_t least) {
  const auto actual = sizes_of(tensor);
  if (!tensor.defined() || actual.size() < least || !is_one_of(tensor.scalar_type(), dtypes)) {
    refuse(name, tensor, dtypes, dtype_words, std::string("[..., ") + label + "]");
  }
  same_device(name, tensor);
  return std::vector<int64_t>(actual.begin(), actual.end());
}

void Check::sized(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes,
                  std::initializer_list<ScalarType> dtypes) {
  const auto actual = sizes_of(tensor);
  bool fits = tensor.defined() && actual.size() == sizes.size();
  for (size_t axis = 0; fits && axis < sizes.size(); ++axis) fits = sizes[axis] == actual[axis];
  if (!fits || !is_one_of(tensor.scalar_type(), dtypes)) {
    refuse(name, tensor, dtypes, nullptr, shape_text(sizes));
  }
  same_device(name, tensor);
}

void Check::rope(const Tensor& rope, int64_t tokens, int64_t head_dim) {
  tensor("rope", rope, {tokens, kAny, 2}, {ScalarType::Float}, {"float32 or float64", {nullptr, "rope_dim / 2"}});
  if (2 * rope.size(1) <= head_dim) return;
  require(false,
          "rope must have at most " + std::to_string(head_dim / 2) + " pairs, got " + std::to_string(rope.size(1)));
}

void Check::written(const char* name, const Tensor& tensor) const {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    if (sizes[axis] > 1 && strides[axis] == 0) {
      require(false, std::string(name) + " must not be expanded, since it is written; clone it");
    }
  }
}

void Check::same_device(const char* name, const Tensor& tensor) {
  const std::string device = device_text(tensor);
  if (first_name_ == nullptr) {
    first_name_ = name;
    device_ = device;
  }
  if (device != device_) {
    require(false, std::string(name) + " must be on " + device_ + " as " + first_name_ + " is, got " + device);
  }
}

void Check::refuse(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes,
                   const char* dtype_words, const std::string& shape) const {
  // A dtype that Python's formulas take, but these kernels do not: whoever gets here has called torch.ops.
  const bool formula =
      tensor.defined() && dtype_words != nullptr && !is_one_of(tensor.scalar_type(), dtypes) &&
      (" " + std::string(dtype_words) + " ").find(" " + std::string(dtype_name(tensor.scalar_type())) + " ") !=
          std::string::npos;
  require(false, std::string(name) + " must be " + dtypes_text(dtypes, formula ? nullptr : dtype_words) + " " + shape +
                     ", got " + described(tensor) + (formula ? "; dsv4.ops takes that too" : ""));
}

void Check::require(bool condition, const std::string& message) const {
  if (!condition) throw std::runtime_error(std::string(op_) + ": " + message);
}

void Check::raise(const Status& status) const {
  if (!status.is_ok()) throw std::runtime_error(status.message());
}

Context Check::context(const Tensor& on) const {
  Context context;
#if defined(DSV4_HOST_MODEL)
  (void)on;
  context.device = Device::kCuda;
  context.best = limited(Isa::kSm90);
#elif defined(DSV4_TORCH_CUDA)
  context.device = Device::kCuda;
  context.device_index = on.get_device_index();
  Isa isa = Isa::kScalar;
  raise(cuda_isa(context.device_index, &isa));
  context.best = limited(isa);
  require(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA: install a CUDA build of torch");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(context.device_index, &context.stream));
#else
  (void)on;
  context.best = limited(cpu_isa());
  context.parallel_for = torch_parallel_for;
  context.threads = static_cast<int>(torch::stable::get_num_threads());
#endif
  return context;
}

AnyView<2> rows_view(const Tensor& tensor) {
  const int64_t size = tensor.size(tensor.dim() - 1);
  AnyView<2> view;
  view.data = const_cast<void*>(tensor.const_data_ptr());
  view.dtype = dtype_of(tensor) == DType::kNone ? DType::kUInt8 : dtype_of(tensor);
  view.shape[0] = size == 0 ? 0 : tensor.numel() / size;
  view.shape[1] = view.stride[0] = size;
  view.stride[1] = 1;
  return view;
}

AnyView<2> mutable_rows_view(const Tensor& tensor) {
  AnyView<2> view = rows_view(tensor);
  view.data = tensor.mutable_data_ptr();
  return view;
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& device_of) {
  const Tensor memory = allocate(sizes, dtype, device_of);
  if (Tape* tape = Tape::recording()) tape->keep(memory);
  return memory;
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& device_of) {
  return empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype, device_of);
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& device_of) {
  return empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype, device_of);
}

Workspace Scratch::at_least(int64_t bytes) {
  if (bytes > bytes_) {
    memory_ = allocate(torch::headeronly::IntHeaderOnlyArrayRef(&bytes, 1), ScalarType::Byte, on_);
    bytes_ = bytes;
  }
  if (bytes == 0) return {};
  return {memory_->mutable_data_ptr(), bytes_};
}

Tensor dense(const Tensor& tensor, int axes) {
  if (!tensor.defined()) return tensor;  // not checked yet
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (int64_t axis = tensor.dim() - 1; axis >= 0 && axis >= tensor.dim() - axes; --axis) {
    if (sizes[axis] != 1 && strides[axis] != expected) {
      if (Tape* tape = Tape::recording()) tape->refuse();
      return torch::stable::contiguous(tensor);
    }
    expected *= sizes[axis];
  }
  return tensor;
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return dense(*tensor);
}

}  // namespace dsv4::binding
