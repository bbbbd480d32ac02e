// The mixture-of-experts kernels of each CPU instruction set. ops/moe.cpp chooses among them and has checked the
// parameters.
#pragma once

#include "ops/moe.h"

namespace dsv4::scalar {
int64_t moe_gate_workspace_bytes(const MoeGateParams&, const Context&);
Status moe_gate(const MoeGateParams&, const Context&);
int64_t moe_experts_workspace_bytes(const MoeExpertsParams&, const Context&);
Status moe_experts(const MoeExpertsParams&, const Context&);
int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams&, const Context&);
Status moe_experts_backward(const MoeExpertsBackwardParams&, const Context&);
Status moe_map(const MoeMapParams&, const Context&);
}  // namespace dsv4::scalar

namespace dsv4::avx2 {
int64_t moe_gate_workspace_bytes(const MoeGateParams&, const Context&);
Status moe_gate(const MoeGateParams&, const Context&);
int64_t moe_experts_workspace_bytes(const MoeExpertsParams&, const Context&);
Status moe_experts(const MoeExpertsParams&, const Context&);
int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams&, const Context&);
Status moe_experts_backward(const MoeExpertsBackwardParams&, const Context&);
}  // namespace dsv4::avx2

namespace dsv4::avx512 {
int64_t moe_gate_workspace_bytes(const MoeGateParams&, const Context&);
Status moe_gate(const MoeGateParams&, const Context&);
int64_t moe_experts_workspace_bytes(const MoeExpertsParams&, const Context&);
Status moe_experts(const MoeExpertsParams&, const Context&);
int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams&, const Context&);
Status moe_experts_backward(const MoeExpertsBackwardParams&, const Context&);
}  // namespace dsv4::avx512

namespace dsv4::amx {
int64_t moe_gate_workspace_bytes(const MoeGateParams&, const Context&);
Status moe_gate(const MoeGateParams&, const Context&);
int64_t moe_experts_workspace_bytes(const MoeExpertsParams&, const Context&);
Status moe_experts(const MoeExpertsParams&, const Context&);
int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams&, const Context&);
Status moe_experts_backward(const MoeExpertsBackwardParams&, const Context&);
}  // namespace dsv4::amx
