// Norms and rotations for every NVIDIA GPU from Ampere on. ops/norm_rope.cpp chooses among the candidates and has
// checked the parameters, but not the values of `sequence`: a row whose sequence is none of the table is dropped. Any
// number of rows, dims and rope dims.
#pragma once

#include "ops/norm_rope.h"

namespace dsv4::sm80 {

Status rms_norm(const RmsNormParams&, const Context&);
Status kv_norm_rope(const KvNormRopeParams&, const Context&);
Status apply_rope(const ApplyRopeParams&, const Context&);
Status rope_rows(const RopeRowsParams&, const Context&);
Status query_norm_rope(const QueryNormRopeParams&, const Context&);
Status store_window(const StoreWindowParams&, const Context&);

// Also of rms_norm. The workspace holds sums of pieces of rows, see piece_sums.h.
int64_t norm_rope_backward_workspace_bytes(const NormRopeBackwardParams&);
Status norm_rope_backward(const NormRopeBackwardParams&, const Context&);
Status norm_rope_backward(const char* op, const NormRopeBackwardParams&, const Context&);
Status query_norm_rope_backward(const QueryNormRopeBackwardParams&, const Context&);

}  // namespace dsv4::sm80
