// What every binding uses: checks in the user's words, views of tensors, the context of a device, registration.
// Bindings are compiled for the CPU library, with DSV4_TORCH_CUDA for the CUDA library, and with DSV4_HOST_MODEL
// besides for a library of the tests whose CUDA kernels run on the CPU (tests/cuda_host): there are no devices and
// streams then.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"
#include "torch/tape.h"

namespace dsv4::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kAny = -1;  // a size that may be anything

DType dtype_of(const Tensor& tensor);

// Where an op's parameters have their scratch memory; contracts that have it elsewhere say so by an overload.
template <class Params>
Workspace& workspace_of(Params& params) {
  return params.workspace;
}

// What a message says a tensor must be, where that is more than its sizes and dtypes: the dtypes, including those that
// only Python's formulas take, and a label for each axis (null: the size).
struct Words {
  const char* dtypes = nullptr;
  std::initializer_list<const char*> axes = {};
};

// The checks of one call. Messages name the op, the argument, what it must be and what it is; they reach Python as
// RuntimeError. Tensors must share the device of the first one checked.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // The sizes of a tensor that must have `sizes.size()` dimensions, each of the given size or kAny, and one of
  // `dtypes`.
  std::vector<int64_t> tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                              std::initializer_list<ScalarType> dtypes, const Words& words = {});

  // The sizes of a tensor of at least `least` dimensions, whatever they are; `label` names the last ones.
  std::vector<int64_t> rows(const char* name, const Tensor& tensor, const char* label,
                            std::initializer_list<ScalarType> dtypes, const char* dtype_words = nullptr,
                            size_t least = 1);

  // A tensor of these sizes.
  void sized(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes,
             std::initializer_list<ScalarType> dtypes);

  // float32 (cos, sin) [tokens, pairs, 2] for the last dims of heads of head_dim.
  void rope(const Tensor& rope, int64_t tokens, int64_t head_dim);

  // A tensor that the op writes: each element has its own memory.
  void written(const char* name, const Tensor& tensor) const;

  // Throws "<op>: <message>" unless the condition holds.
  void require(bool condition, const std::string& message) const;

  // Runs an op of csrc/ops on the device of `on` and its current stream or torch's threads, and throws what it reports.
  template <class Params>
  void run(Status (*op)(const Params&, const Context&), const Params& params, const Tensor& on) const {
    on_device(on, [&](const Context& context) { return op(params, context); });
    if (Tape* tape = Tape::recording()) {
      tape->add(on, [op, params](const Context& context, Scratch&) { return op(params, context); });
    }
  }

  // The same with scratch memory, as much as `bytes` says.
  template <class Params>
  void run(Status (*op)(const Params&, const Context&), int64_t (*bytes)(const Params&, const Context&), Params params,
           const Tensor& on) const {
    auto call = [op, bytes, params](const Context& context, Scratch& scratch) mutable {
      workspace_of(params) = scratch.at_least(bytes(params, context));
      return op(params, context);
    };
    Scratch scratch(on);
    on_device(on, [&](const Context& context) { return call(context, scratch); });
    if (Tape* tape = Tape::recording()) tape->add(on, call);
  }

  // The same for anything that returns a Status.
  template <class Body>
  void on_device(const Tensor& on, Body&& body) const {
#if defined(DSV4_TORCH_CUDA) && !defined(DSV4_HOST_MODEL)
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
#endif
    raise(body(context(on)));
  }

 private:
  Context context(const Tensor& on) const;  // where `run` runs
  void raise(const Status& status) const;
  void same_device(const char* name, const Tensor& tensor);
  // Throws what the tensor must be, in `dtype_words` where given, and what it is.
  void refuse(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes, const char* dtype_words,
              const std::string& shape) const;

  const char* op_;
  const char* first_name_ = nullptr;
  std::string device_;
};

// Uninitialised; results, and what else must live as long as a recording of the call.
Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& device_of);
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& device_of);
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& device_of);

// The tensor itself where its last `axes` axes lie densely in memory, else a contiguous copy.
Tensor dense(const Tensor& tensor, int axes = 1);
std::optional<Tensor> dense(const std::optional<Tensor>& tensor);

// Converts to whatever view a parameter struct asks for. `view` reads; `mutable_view` also writes. A missing optional
// tensor gives an empty view. Only checked tensors: the conversion itself trusts dtype and rank.
template <bool kMutable>
class TensorView {
 public:
  explicit TensorView(const Tensor* tensor) : tensor_(tensor) {}

  template <class T, int N>
  operator View<T, N>() const {
    static_assert(kMutable || std::is_const_v<T>, "use mutable_view for what the op writes");
    View<T, N> view;
    if (tensor_ == nullptr) return view;
    view.data = static_cast<T*>(data());
    shape(view);
    return view;
  }

  template <int N>
  operator AnyView<N>() const {
    AnyView<N> view;
    if (tensor_ == nullptr) return view;
    view.data = data();
    view.dtype = dtype_of(*tensor_);
    shape(view);
    return view;
  }

 private:
  void* data() const {
    if constexpr (kMutable) return tensor_->mutable_data_ptr();
    return const_cast<void*>(tensor_->const_data_ptr());
  }

  template <class V>
  void shape(V& view) const {
    constexpr int kRank = std::extent_v<decltype(view.shape)>;
    const auto sizes = tensor_->sizes(), strides = tensor_->strides();
    for (int axis = 0; axis < kRank; ++axis) {
      view.shape[axis] = sizes[axis];
      view.stride[axis] = strides[axis];
    }
  }

  const Tensor* tensor_;
};

inline TensorView<false> view(const Tensor& tensor) { return TensorView<false>(&tensor); }
inline TensorView<false> view(const std::optional<Tensor>& tensor) {
  return TensorView<false>(tensor.has_value() ? &*tensor : nullptr);
}
// A contiguous tensor as rows of its last axis; 8-bit floats are bytes to the kernels.
AnyView<2> rows_view(const Tensor& tensor);
AnyView<2> mutable_rows_view(const Tensor& tensor);

inline TensorView<true> mutable_view(const Tensor& tensor) { return TensorView<true>(&tensor); }

}  // namespace dsv4::binding

// The name of what each library has for itself; not tensor operations.
#if defined(DSV4_HOST_MODEL)
#define DSV4_LIBRARY_OP(name) "_host_model_" name
#elif defined(DSV4_TORCH_CUDA)
#define DSV4_LIBRARY_OP(name) "_cuda_" name
#else
#define DSV4_LIBRARY_OP(name) "_cpu_" name
#endif

// Registers a function of this file as torch.ops.dsv4.<function>. The CPU library brings the schema, so it is loaded
// first.
#if defined(DSV4_HOST_MODEL)  // a key that nobody else uses: the library may stand beside the CUDA library
#define DSV4_OP(schema, function) \
  STABLE_TORCH_LIBRARY_IMPL(dsv4, PrivateUse1, library) { library.impl(#function, TORCH_BOX(&function)); }
#elif defined(DSV4_TORCH_CUDA)
#define DSV4_OP(schema, function) \
  STABLE_TORCH_LIBRARY_IMPL(dsv4, CUDA, library) { library.impl(#function, TORCH_BOX(&function)); }
#else
#define DSV4_OP(schema, function)                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(dsv4, library) { library.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(dsv4, CPU, library) { library.impl(#function, TORCH_BOX(&function)); }
#endif
