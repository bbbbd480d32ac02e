// The Hadamard rotation of rows. The last axis of every tensor is contiguous.
#pragma once

#include "common/context.h"
#include "common/status.h"
#include "common/view.h"

namespace dsv4 {

// Each row times the Sylvester Hadamard matrix over sqrt(n), rounded once to its type.
struct HadamardParams {
  AnyView<2> x;       // bfloat16 or float32 [rows, n], n a power of two
  AnyView<2> result;  // like x
  Workspace workspace;
};

// What the call needs in workspace.bytes under this context; result and workspace are not read.
int64_t hadamard_workspace_bytes(const HadamardParams&, const Context&);

Status hadamard(const HadamardParams&, const Context&);

}  // namespace dsv4
