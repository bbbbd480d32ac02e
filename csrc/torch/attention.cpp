#include "ops/attention.h"

#include "torch/pool.h"

namespace dsv4::binding {
namespace {

constexpr const char* kFloats = "bfloat16 or float16 or float32 or float64";
constexpr int64_t kRopeDim = 64;  // of FP8 rows, unless a rotation or the caller says otherwise

// A pool of a call and its table. Holds what had to be copied, so it must outlive the call.
struct Pool {
  Tensor pages, table;
  int64_t page_size;

  // `axes`: how many of the last of plain pages must lie densely.
  Pool(Check& check, const std::string& name, const Tensor& pages_, const Tensor& table_, int64_t sequences,
       int64_t page_size_, int64_t head_dim, int64_t rope_dim, int axes)
      : pages(pages_), table(dense(table_)), page_size(page_size_) {
    const std::string pages_name = name + "_pages", table_name = name + "_table";
    check_pages(check, pages_name.c_str(), false, pages, page_size, head_dim, rope_dim);
    check.tensor(table_name.c_str(), table, {sequences, kAny}, {ScalarType::Int},
                 {nullptr, {sequences == kAny ? "sequences" : nullptr, "blocks"}});
    pages = dense(pages, plain() ? axes : 1);
  }

  bool plain() const { return pages.scalar_type() != ScalarType::Byte; }

  // Room for the gradient; of a pool of bytes, which has none, [0] like query.
  Tensor gradient(const Tensor& query) const {
    if (!plain()) return empty({0}, query.scalar_type(), query);
    return empty({pages.size(0), pages.size(1), pages.size(2)}, pages.scalar_type(), query);
  }

  operator RowPool() const {
    RowPool pool{};
    pool.table = view(table);
    pool.page_size = page_size;
    if (plain()) {
      pool.plain = view(pages);
    } else {
      pool.bytes = view(pages);
    }
    return pool;
  }
};

// The arguments of a call, checked. Holds what had to be copied, so it must outlive the call.
struct Arguments {
  Tensor query, sequence, position, sink;
  std::optional<Tensor> indices, lengths, rope;
  std::optional<Pool> raw, entries;
  int64_t rope_dim, window;
  double scale;

  Arguments(Check& check, int pool_axes, const Tensor& query_, const Tensor& window_pages, const Tensor& window_table,
            const std::optional<Tensor>& compressed_pages, const std::optional<Tensor>& compressed_table,
            const Tensor& sequence_, const Tensor& position_, const std::optional<Tensor>& indices_,
            const std::optional<Tensor>& lengths_, const Tensor& sink_, const std::optional<Tensor>& rope_,
            int64_t window_, double scale_, int64_t window_page_size, int64_t page_size,
            std::optional<int64_t> rope_dim_)
      : query(query_),
        sequence(sequence_),
        position(position_),
        sink(sink_),
        indices(indices_),
        lengths(lengths_),
        rope(rope_),
        rope_dim(rope_dim_.value_or(kRopeDim)),
        window(window_),
        scale(scale_) {
    const auto sizes = check.tensor("query", query, {kAny, kAny, kAny}, {ScalarType::BFloat16, ScalarType::Float},
                                    {kFloats, {"tokens", "heads", "head_dim"}});
    const int64_t tokens = sizes[0], heads = sizes[1], head_dim = sizes[2];
    check.tensor("sequence", sequence, {tokens}, {ScalarType::Int});
    check.tensor("position", position, {tokens}, {ScalarType::Int});
    check.tensor("sink", sink, {heads}, {ScalarType::Float}, {"float32 or float64"});
    if (rope.has_value()) check_rope(check, tokens, head_dim, rope_dim_.has_value());
    raw.emplace(check, "window", window_pages, window_table, kAny, window_page_size, head_dim, rope_dim, pool_axes);
    if (compressed_pages.has_value()) {
      check.require(compressed_table.has_value(), "compressed_table must be given with compressed_pages, got None");
      check.require(lengths.has_value(), "lengths must be given with compressed_pages, got None");
      entries.emplace(check, "compressed", *compressed_pages, *compressed_table, raw->table.size(0), page_size,
                      head_dim, rope_dim, pool_axes);
      check.tensor("lengths", *lengths, {tokens}, {ScalarType::Int});
      if (indices.has_value())
        check.tensor("indices", *indices, {tokens, kAny}, {ScalarType::Int}, {nullptr, {nullptr, "k"}});
    } else {
      check.require(!compressed_table.has_value(), "compressed_table must be None without compressed_pages");
      check.require(!indices.has_value(), "indices must be None without compressed_pages");
      check.require(!lengths.has_value(), "lengths must be None without compressed_pages");
    }
    query = dense(query);
    sequence = dense(sequence);
    position = dense(position);
    sink = dense(sink);
    indices = dense(indices);
    lengths = dense(lengths);
    if (rope.has_value()) rope = dense(*rope, 2);
  }

  // All but out and the workspace.
  SparseAttentionParams params(const Tensor& lse) const {
    return {view(query),
            *raw,
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
            {},
            view(lse),
            {}};
  }

 private:
  void check_rope(Check& check, int64_t tokens, int64_t head_dim, bool rope_dim_given) {
    check.rope(*rope, tokens, head_dim);
    const int64_t width = 2 * rope->size(1);
    check.require(!rope_dim_given || rope_dim == width,
                  "rope_dim must be that of rope, " + std::to_string(width) + ", got " + std::to_string(rope_dim));
    rope_dim = width;
  }
};

std::tuple<Tensor, Tensor> sparse_attention(const Tensor& query, const Tensor& window_pages, const Tensor& window_table,
                                            const std::optional<Tensor>& compressed_pages,
                                            const std::optional<Tensor>& compressed_table, const Tensor& sequence,
                                            const Tensor& position, const std::optional<Tensor>& indices,
                                            const std::optional<Tensor>& lengths, const Tensor& sink,
                                            const std::optional<Tensor>& rope, int64_t window, double scale,
                                            int64_t window_page_size, int64_t page_size,
                                            std::optional<int64_t> rope_dim) {
  Check check("sparse_attention");
  const Arguments call(check, 1, query, window_pages, window_table, compressed_pages, compressed_table, sequence,
                       position, indices, lengths, sink, rope, window, scale, window_page_size, page_size, rope_dim);
  const int64_t tokens = query.size(0), heads = query.size(1);
  Tensor out = empty({tokens, heads, query.size(2)}, query.scalar_type(), query);
  Tensor lse = empty({tokens, heads}, ScalarType::Float, query);
  SparseAttentionParams params = call.params(lse);
  params.out = mutable_view(out);
  params.lse = mutable_view(lse);
  check.run(dsv4::sparse_attention, dsv4::sparse_attention_workspace_bytes, params, query);
  return {out, lse};
}
DSV4_OP(
    "sparse_attention(Tensor query, Tensor window_pages, Tensor window_table, Tensor? compressed_pages, "
    "Tensor? compressed_table, Tensor sequence, Tensor position, Tensor? indices, Tensor? lengths, Tensor sink, "
    "Tensor? rope, int window, float scale, int window_page_size=256, int page_size=64, int? rope_dim=None) "
    "-> (Tensor, Tensor)",
    sparse_attention)

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_attention_backward(
    const Tensor& grad_out_, const Tensor& grad_lse_, const Tensor& lse_, const Tensor& query,
    const Tensor& window_pages, const Tensor& window_table, const std::optional<Tensor>& compressed_pages,
    const std::optional<Tensor>& compressed_table, const Tensor& sequence, const Tensor& position,
    const std::optional<Tensor>& indices, const std::optional<Tensor>& lengths, const Tensor& sink,
    const std::optional<Tensor>& rope, int64_t window, double scale, int64_t window_page_size, int64_t page_size,
    std::optional<int64_t> rope_dim) {
  Check check("sparse_attention_backward");
  const Arguments call(check, 3, query, window_pages, window_table, compressed_pages, compressed_table, sequence,
                       position, indices, lengths, sink, rope, window, scale, window_page_size, page_size, rope_dim);
  const int64_t tokens = query.size(0), heads = query.size(1), head_dim = query.size(2);
  const ScalarType x = query.scalar_type();
  check.tensor("grad_out", grad_out_, {tokens, heads, head_dim}, {x});
  check.tensor("grad_lse", grad_lse_, {tokens, heads}, {ScalarType::Float});
  check.tensor("lse", lse_, {tokens, heads}, {ScalarType::Float});
  const Tensor grad_out = dense(grad_out_), grad_lse = dense(grad_lse_), lse = dense(lse_);
  Tensor grad_query = empty({tokens, heads, head_dim}, x, query), grad_sink = empty({heads}, ScalarType::Float, query);
  Tensor grad_window = call.raw->gradient(query);
  Tensor grad_compressed = call.entries.has_value() ? call.entries->gradient(query) : empty({0}, x, query);
  SparseAttentionBackwardParams params{};
  params.forward = call.params(lse);
  params.grad_out = view(grad_out);
  params.grad_lse = view(grad_lse);
  params.grad_query = mutable_view(grad_query);
  if (call.raw->plain()) params.grad_window = mutable_view(grad_window);
  if (call.entries.has_value() && call.entries->plain()) params.grad_compressed = mutable_view(grad_compressed);
  params.grad_sink = mutable_view(grad_sink);
  check.run(dsv4::sparse_attention_backward, dsv4::sparse_attention_backward_workspace_bytes, params, query);
  return {grad_query, grad_window, grad_compressed, grad_sink};
}
DSV4_OP(
    "sparse_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor lse, Tensor query, "
    "Tensor window_pages, Tensor window_table, Tensor? compressed_pages, Tensor? compressed_table, Tensor sequence, "
    "Tensor position, Tensor? indices, Tensor? lengths, Tensor sink, Tensor? rope, int window, float scale, "
    "int window_page_size=256, int page_size=64, int? rope_dim=None) -> (Tensor, Tensor, Tensor, Tensor)",
    sparse_attention_backward)

}  // namespace
}  // namespace dsv4::binding
