// Launches of moe.cu that the gradient of the experts begins with.
#pragma once

#include "common/status.h"
#include "cuda/sm80/expert_tiles.h"
#include "ops/moe.h"

namespace dsv4::sm80 {

Status launch_map(const char* op, const MapArguments&, const Context&);

// out = w x for the rows of tile_count tiles of tile_rows (a multiple of 64), or for a.rows rows of one expert, where
// a.tiles is none; a.first need not be set. Sums are those of the forward pass, to the bit.
Status launch_product(const char* op, const ExpertMatrix& w, int64_t tile_count, int64_t tile_rows, ExpertArguments a,
                      const Context&);

}  // namespace dsv4::sm80
