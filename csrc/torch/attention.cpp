#include "ops/attention.h"

#include "common/pages.h"
#include "torch/glue.h"

namespace dsv4::binding {
namespace {

constexpr int64_t kRopeDim = 64;  // of FP8 rows, unless a rotation or the caller says otherwise

// A pool of a call and its table. Holds what had to be copied, so it must outlive the call.
struct Pool {
  Tensor pages, table;
  int64_t page_size;

  Pool(Check& check, const std::string& name, const Tensor& pages_, const Tensor& table_, int64_t sequences,
       int64_t page_size_, int64_t head_dim, int64_t rope_dim)
      : pages(pages_), table(dense(table_)), page_size(page_size_) {
    const std::string pages_name = name + "_pages", table_name = name + "_table";
    check.require(page_size >= 1,
                  "the page size of " + pages_name + " must be at least 1, got " + std::to_string(page_size));
    if (pages.scalar_type() == ScalarType::Byte) {
      check.require(rope_dim >= 0 && rope_dim < head_dim, "rope_dim must lie in [0, " + std::to_string(head_dim) +
                                                              ") for FP8 rows, got " + std::to_string(rope_dim));
      check.tensor(pages_name.c_str(), pages, {kAny, fp8_page_bytes(page_size, head_dim, rope_dim)},
                   {ScalarType::Byte});
    } else {
      check.tensor(pages_name.c_str(), pages, {kAny, page_size, head_dim}, {ScalarType::BFloat16, ScalarType::Float});
    }
    check.tensor(table_name.c_str(), table, {sequences, kAny}, {ScalarType::Int});
    pages = dense(pages);
  }

  operator RowPool() const {
    RowPool pool{};
    pool.table = view(table);
    pool.page_size = page_size;
    if (pages.scalar_type() == ScalarType::Byte) {
      pool.bytes = view(pages);
    } else {
      pool.plain = view(pages);
    }
    return pool;
  }
};

std::tuple<Tensor, Tensor> sparse_attention(const Tensor& query_, const Tensor& window_pages,
                                            const Tensor& window_table, const std::optional<Tensor>& compressed_pages,
                                            const std::optional<Tensor>& compressed_table, const Tensor& sequence_,
                                            const Tensor& position_, const std::optional<Tensor>& indices_,
                                            const std::optional<Tensor>& lengths_, const Tensor& sink_,
                                            const std::optional<Tensor>& rope_, int64_t window, double scale,
                                            int64_t window_page_size, int64_t page_size,
                                            std::optional<int64_t> rope_dim_) {
  Check check("sparse_attention");
  const auto sizes = check.tensor("query", query_, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float});
  const int64_t tokens = sizes[0], heads = sizes[1], head_dim = sizes[2];
  check.tensor("sequence", sequence_, {tokens}, {ScalarType::Int});
  check.tensor("position", position_, {tokens}, {ScalarType::Int});
  check.tensor("sink", sink_, {heads}, {ScalarType::Float});
  int64_t rope_dim = rope_dim_.value_or(kRopeDim);
  if (rope_.has_value()) {
    check.tensor("rope", *rope_, {tokens, kAny, 2}, {ScalarType::Float});
    const int64_t width = 2 * rope_->size(1);
    check.require(width <= head_dim, "rope must have at most " + std::to_string(head_dim / 2) + " pairs, got " +
                                         std::to_string(width / 2));
    check.require(!rope_dim_.has_value() || rope_dim == width,
                  "rope_dim must be that of rope, " + std::to_string(width) + ", got " + std::to_string(rope_dim));
    rope_dim = width;
  }
  const Tensor query = dense(query_), sequence = dense(sequence_), position = dense(position_), sink = dense(sink_);
  const std::optional<Tensor> indices = dense(indices_), lengths = dense(lengths_);
  const std::optional<Tensor> rope = rope_.has_value() ? std::optional<Tensor>(dense(*rope_, 2)) : std::nullopt;
  const Pool raw(check, "window", window_pages, window_table, kAny, window_page_size, head_dim, rope_dim);
  std::optional<Pool> entries;
  if (compressed_pages.has_value()) {
    check.require(compressed_table.has_value(), "compressed_table must be given with compressed_pages, got None");
    check.require(lengths.has_value(), "lengths must be given with compressed_pages, got None");
    entries.emplace(check, "compressed", *compressed_pages, *compressed_table, raw.table.size(0), page_size, head_dim,
                    rope_dim);
    check.tensor("lengths", *lengths, {tokens}, {ScalarType::Int});
    if (indices.has_value()) check.tensor("indices", *indices, {tokens, kAny}, {ScalarType::Int});
  } else {
    check.require(!compressed_table.has_value(), "compressed_table must be None without compressed_pages");
    check.require(!indices.has_value(), "indices must be None without compressed_pages");
    check.require(!lengths.has_value(), "lengths must be None without compressed_pages");
  }
  Tensor out = empty({tokens, heads, head_dim}, query.scalar_type(), query);
  Tensor lse = empty({tokens, heads}, ScalarType::Float, query);
  SparseAttentionParams params{view(query),
                               raw,
                               entries.has_value() ? static_cast<RowPool>(*entries) : RowPool{},
                               view(sequence),
                               view(position),
                               view(indices),
                               view(lengths),
                               view(sink),
                               view(rope),
                               rope_dim,
                               window,
                               static_cast<float>(scale),
                               mutable_view(out),
                               mutable_view(lse),
                               {}};
  const Scratch scratch(dsv4::sparse_attention_workspace_bytes(params, check.context(query)), query);
  params.workspace = scratch;
  check.run(dsv4::sparse_attention, params, query);
  return {out, lse};
}
DSV4_OP(
    "sparse_attention(Tensor query, Tensor window_pages, Tensor window_table, Tensor? compressed_pages, "
    "Tensor? compressed_table, Tensor sequence, Tensor position, Tensor? indices, Tensor? lengths, Tensor sink, "
    "Tensor? rope, int window, float scale, int window_page_size=256, int page_size=64, int? rope_dim=None) "
    "-> (Tensor, Tensor)",
    sparse_attention)

}  // namespace
}  // namespace dsv4::binding
