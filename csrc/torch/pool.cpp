#include "torch/pool.h"

#include "common/pages.h"

namespace dsv4::binding {

void check_pages(Check& check, const char* name, bool keys, const Tensor& pages, int64_t page_size, int64_t head_dim,
                 int64_t rope_dim) {
  if (page_size < 1) {
    check.require(false,
                  "the page size of " + std::string(name) + " must be at least 1, got " + std::to_string(page_size));
  }
  if (!pages.defined() || pages.scalar_type() != ScalarType::Byte) {
    check.tensor(name, pages, {kAny, page_size, head_dim}, {ScalarType::BFloat16, ScalarType::Float},
                 {"bfloat16 or float16 or float32 or float64", {"pages"}});
    return;
  }
  check.require(keys || rope_dim < head_dim, "rope_dim must lie in [0, " + std::to_string(head_dim) +
                                                 ") for FP8 rows, got " + std::to_string(rope_dim));
  const int64_t bytes = keys ? page_size * fp8_key_bytes(head_dim) : fp8_page_bytes(page_size, head_dim, rope_dim);
  const int64_t fp4 = page_size * fp4_key_bytes(head_dim);
  const bool may_be_fp4 = keys && head_dim % kIndexScaleDims == 0;
  const bool is_fp4 = may_be_fp4 && pages.dim() == 2 && pages.size(1) == fp4;
  const std::string wanted = (may_be_fp4 ? std::to_string(fp4) + " or " : "") + std::to_string(bytes);
  check.tensor(name, pages, {kAny, is_fp4 ? fp4 : bytes}, {ScalarType::Byte}, {nullptr, {"pages", wanted.c_str()}});
}

WrittenPool::WrittenPool(Check& check, bool keys, const Tensor& pages, const Tensor& table, int64_t page_size,
                         int64_t head_dim, int64_t rope_dim)
    : pages_(pages), table_(dense(table)), page_size_(page_size) {
  check_pages(check, "pages", keys, pages, page_size, head_dim, rope_dim);
  check.written("pages", pages);
  check.tensor("table", table, {kAny, kAny}, {ScalarType::Int}, {nullptr, {"sequences", "blocks"}});
}

WrittenPool::operator RowPool() const {
  RowPool pool{};
  pool.table = view(table_);
  pool.page_size = page_size_;
  if (pages_.tensor().scalar_type() == ScalarType::Byte) {
    pool.bytes = mutable_view(pages_.tensor());
  } else {
    pool.plain = mutable_view(pages_.tensor());
  }
  return pool;
}

}  // namespace dsv4::binding
