// index_topk in two or three kernels: the scores of some rows to the workspace, at most 64 MB of them (or one row's);
// the best k of ranges of 8192 entries, where a row may have several times as many; the best k of those, or of all.
//
// Scores (index_scores.h): 2 H D FLOP an entry and row on the tensor cores, and 3 H of relu and weights; of bytes,
// 68 (FP4), 132 (FP8) or 256 (bfloat16) an entry and block of rows, and 4 written. With 64 heads bound by the tensor
// cores. Selection (index_select.h): 4 bytes an entry from L2.
#include "cuda/common/launch.h"
#include "cuda/sm80/index.h"
#include "cuda/sm80/index_scores.h"
#include "cuda/sm80/index_select.h"
#include "cuda/sm80/operands.h"

namespace dsv4::sm80 {

DSV4_KERNEL(kIndexThreads, 3) sm80_bf16_index_scores(const IndexArguments a) { index_scores<IndexSums>(a); }
DSV4_KERNEL(kIndexThreads, 3) sm80_bf16_index_scores_plain(const IndexArguments a) { index_scores_plainly<bf16>(a); }
DSV4_KERNEL(kIndexThreads, 3) sm80_f32_index_scores_plain(const IndexArguments a) { index_scores_plainly<float>(a); }
DSV4_KERNEL(kSelectThreads, 3) sm80_f32_index_select(const SelectArguments a) { index_select(a); }

namespace {

constexpr int64_t kScoresAtOnce = int64_t{1} << 24;
constexpr int64_t kRange = 8192;
constexpr int64_t kScoreBlocks = 1024;  // as many as fill every GPU: beyond, blocks take more rows
constexpr int kMaxRowsPerBlock = 16;

int64_t clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

IndexPool pool_of(const IndexTopkParams& p) {
  IndexPool pool = {};
  const int64_t dim = p.query.size(2);
  const bool bytes = p.bytes.given(), wide = p.plain.dtype == DType::kFloat32;
  const bool fp4 = bytes && holds_fp4_keys(p.bytes.size(1), p.page_size, dim);
  pool.format = fp4     ? IndexKeyFormat::kFp4
                : bytes ? IndexKeyFormat::kFp8
                : wide  ? IndexKeyFormat::kFloat32
                        : IndexKeyFormat::kBFloat16;
  const int64_t size = size_of(p.plain.dtype);
  pool.data = static_cast<const uint8_t*>(bytes ? p.bytes.data : p.plain.data);
  pool.pages = bytes ? p.bytes.size(0) : p.plain.size(0);
  pool.page_stride = bytes ? p.bytes.stride[0] : p.plain.stride[0] * size;
  pool.key_stride = fp4 ? dim / 2 : bytes ? dim : p.plain.stride[1] * size;
  pool.scales = bytes ? p.page_size * pool.key_stride : 0;
  pool.scale_bytes = static_cast<int>(fp4 ? dim / kIndexScaleDims : bytes ? 4 : 0);
  pool.table = static_cast<const int32_t*>(p.table.data);
  pool.table_stride = p.table.stride[0];
  pool.sequences = p.table.size(0);
  pool.page_size = static_cast<uint32_t>(p.page_size);
  pool.dim = static_cast<int>(dim);
  pool.vector = dim % 32 == 0 && aligned(pool.data) && pool.page_stride % 16 == 0 && pool.key_stride % 16 == 0;
  return pool;
}

int64_t ranges_of(const IndexCut& cut) { return cut.entries > cut.range ? ceil_div(cut.entries, cut.range) : 1; }

int64_t scores_bytes(const IndexCut& cut) { return round_up(4 * cut.group_rows * cut.entries, 64); }

// Of the candidates' scores, or of their entries.
int64_t candidate_bytes(const IndexTopkParams& p, const IndexCut& cut) {
  const int64_t ranges = ranges_of(cut);
  return ranges > 1 ? round_up(4 * cut.group_rows * ranges * p.k, 64) : 0;
}

Status launch_scores(const IndexArguments& a, const IndexScoresKernel& by_tensor_cores, const Context& context) {
  const IndexTopkParams& p = a.params;
  const bool wide = p.query.dtype == DType::kFloat32;
  const bool tensor_cores = !wide && a.pool.format != IndexKeyFormat::kFloat32 && a.pool.dim <= kIndexMaxDim;
  cuda::LaunchShape shape;
  shape.blocks_x = a.tiles * ceil_div(a.end_row - a.first_row, tensor_cores ? a.rows_per_block : 1);
  shape.threads = kIndexThreads;
  shape.shared_bytes = tensor_cores ? by_tensor_cores.shared_bytes : 0;
  const auto kernel = tensor_cores ? by_tensor_cores.run
                      : wide       ? sm80_f32_index_scores_plain
                                   : sm80_bf16_index_scores_plain;
  return cuda::launch("index_topk", kernel, shape, context, a);
}

Status launch_select(const SelectArguments& a, int64_t rows, const Context& context) {
  cuda::LaunchShape shape;
  shape.blocks_x = rows * (a.last ? 1 : a.ranges);
  shape.threads = kSelectThreads;
  shape.shared_bytes = kSelectSharedBytes;
  return cuda::launch("index_topk", sm80_f32_index_select, shape, context, a);
}

}  // namespace

IndexCut index_cut(const IndexTopkParams& p) {
  IndexCut cut = {};
  const int64_t blocks = p.table.size(1);
  cut.entries = blocks > INT32_MAX / p.page_size ? INT32_MAX : blocks * p.page_size;
  cut.group_rows = clamp(kScoresAtOnce / (cut.entries > 0 ? cut.entries : 1), 1, p.query.size(0));
  const int64_t single = ceil_div(cut.entries, kIndexTile) * cut.group_rows;
  cut.rows_per_block = static_cast<int>(clamp(single / kScoreBlocks, 1, kMaxRowsPerBlock));
  // Ranges pay where they leave far fewer.
  cut.range = cut.entries >= 4 * kRange && p.k <= kRange / 4 ? kRange : clamp(cut.entries, 1, INT32_MAX);
  return cut;
}

int64_t index_topk_workspace_bytes(const IndexTopkParams& p, const IndexCut& cut) {
  return scores_bytes(cut) + 2 * candidate_bytes(p, cut);
}

Status index_topk(const IndexTopkParams& p, const IndexCut& cut, const Context& context) {
  constexpr IndexScoresKernel kScores = {sm80_bf16_index_scores, kIndexScoresSharedBytes<IndexSums>};
  return index_topk(p, cut, kScores, context);
}

Status index_topk(const IndexTopkParams& p, const IndexCut& cut, const IndexScoresKernel& by_tensor_cores,
                  const Context& context) {
  const int64_t tokens = p.query.size(0), needed = index_topk_workspace_bytes(p, cut);
  if (p.workspace.bytes < needed) {
    return Status::error("index_topk: workspace has %lld bytes, needs %lld", static_cast<long long>(p.workspace.bytes),
                         static_cast<long long>(needed));
  }
  uint8_t* memory = static_cast<uint8_t*>(p.workspace.data);
  IndexArguments scores = {};
  scores.params = p;
  scores.pool = pool_of(p);
  scores.scores = reinterpret_cast<uint32_t*>(memory);
  scores.entries = cut.entries;
  scores.tiles = ceil_div(cut.entries, kIndexTile);
  scores.rows_per_block = cut.rows_per_block;
  scores.heads = static_cast<int>(p.query.size(1));
  scores.units = (scores.pool.dim + 31) / 32;
  scores.vector_query = scores.pool.dim % 32 == 0 && in_pieces(p.query);
  SelectArguments select = {};
  select.params = p;
  select.scores = scores.scores;
  select.entries = cut.entries;
  select.sequences = scores.pool.sequences;
  select.range = cut.range;
  select.ranges = ranges_of(cut);
  select.candidate_scores = reinterpret_cast<uint32_t*>(memory + scores_bytes(cut));
  select.candidate_entries = reinterpret_cast<int32_t*>(memory + scores_bytes(cut) + candidate_bytes(p, cut));
  for (int64_t first = 0; first < tokens; first += cut.group_rows) {
    const int64_t rows = clamp(tokens - first, 1, cut.group_rows);
    scores.first_row = select.first_row = first;
    scores.end_row = first + rows;
    Status status = cut.entries > 0 ? launch_scores(scores, by_tensor_cores, context) : Status::ok();
    if (status.is_ok() && select.ranges > 1) {
      select.last = false;
      status = launch_select(select, rows, context);
    }
    select.last = true;
    if (status.is_ok()) status = launch_select(select, rows, context);
    if (!status.is_ok()) return status;
  }
  return Status::ok();
}

int64_t index_topk_workspace_bytes(const IndexTopkParams& p) { return index_topk_workspace_bytes(p, index_cut(p)); }

Status index_topk(const IndexTopkParams& p, const Context& context) { return index_topk(p, index_cut(p), context); }

}  // namespace dsv4::sm80
