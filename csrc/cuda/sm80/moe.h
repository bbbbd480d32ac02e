// The mixture of experts for every NVIDIA GPU from Ampere on. ops/moe.cpp chooses among the candidates and has checked
// the parameters, but not values in the GPU's memory.
#pragma once

#include "ops/moe.h"

namespace dsv4::sm80 {

// A token id that is none of the table, and an expert in the table that is none, give index -1 and weight 0.
int64_t moe_gate_workspace_bytes(const MoeGateParams&, const Context&);
Status moe_gate(const MoeGateParams&, const Context&);

// Fastest where w1 and w3 are of one form and their scales of one type.
int64_t moe_experts_workspace_bytes(const MoeExpertsParams&, const Context&);
Status moe_experts(const MoeExpertsParams&, const Context&);

// Tiles of the shared expert: of 8, 32 or 64 tokens.
enum class SharedTile { kFew, kSome, kMany };

// How a call is cut, which changes no bit of the results.
struct ExpertCut {
  int64_t tokens;  // taken at a time
  bool many;       // tiles of 64 rows, not 8, of the routed experts
  SharedTile shared;
  bool tile_at_row;  // see moe_map.h
};
ExpertCut expert_cut(const MoeExpertsParams&);

// Where in the workspace the intermediate results of the tokens taken last lie, in bytes: activations for w2 in the
// form that its weights ask for (activations.h), and the outputs of w2, [rows, hidden] of the type of x. Routed rows
// are ordered by expert, then pair; the shared expert's are the tokens.
struct ExpertResults {
  int64_t inner, shared_inner, outputs, shared_outputs;
};
ExpertResults expert_results(const MoeExpertsParams&, const ExpertCut&);
int64_t moe_experts_workspace_bytes(const MoeExpertsParams&, const ExpertCut&);
Status moe_experts(const MoeExpertsParams&, const ExpertCut&, const Context&);

// Rows are numbered in 32 bits: fewer than 2^31 pairs of a token and a slot.
bool accepts_moe_experts_backward(const MoeExpertsBackwardParams&);
int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams&, const Context&);
Status moe_experts_backward(const MoeExpertsBackwardParams&, const Context&);

// How a call is cut, which changes no bit of the results.
struct GradientCut {
  bool many, many_shared;  // tiles of 128 rows, not 64: of the routed experts, of the shared one
  bool tile_at_row;        // see moe_map.h
  int64_t columns;         // of the gradient of x, taken at a time: a multiple of 128
};
GradientCut gradient_cut(const MoeExpertsBackwardParams&);

// Where in the workspace the rows [rows, inter] of the routed experts or of the shared one lie, in bytes: the gradients
// of gate and up, and what w2 multiplied. Routed rows are ordered by expert, then pair.
struct GradientRows {
  int64_t gate, up, inner;
};
GradientRows gradient_rows(const MoeExpertsBackwardParams&, const GradientCut&, bool shared);
int64_t moe_experts_backward_workspace_bytes(const MoeExpertsBackwardParams&, const GradientCut&);
Status moe_experts_backward(const MoeExpertsBackwardParams&, const GradientCut&, const Context&);

Status moe_map(const MoeMapParams&, const Context&);

}  // namespace dsv4::sm80
