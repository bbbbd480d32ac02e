// What the tests of kernels on rows share: pools that are written, rotations, and the scalar kernels' own code as the
// yardstick, which runs on the host's copy of the operands.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "buffer.h"
#include "ops/page_places.h"

namespace dsv4::testing {

// One thread, as the scalar kernels take it.
inline Context scalar_context() {
  Context context;
  context.parallel_for = [](void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* argument) {
    body(argument, 0, count);
  };
  return context;
}

// A tensor's view, on the device or of its copy on the host.
template <int N, class T>
AnyView<N> view_of(DeviceTensor<T>& tensor, bool on_host, int64_t shift = 0) {
  AnyView<N> view = tensor.template any<N>();
  view.data = (on_host ? &tensor.at(0) : tensor.device()) + shift;
  return view;
}

inline void fill_turns(DeviceTensor<float>& rope, uint64_t seed) {
  for (int64_t t = 0; t < rope.rows(); ++t) {
    Random random(seed * 1000003 + static_cast<uint64_t>(t));
    for (int64_t i = 0; i + 1 < rope.inner(); i += 2) {
      const float angle = random.uniform(-50, 50);
      rope.at(t, i) = std::cos(angle);
      rope.at(t, i + 1) = std::sin(angle);
    }
  }
  rope.upload();
}

// Of a page.
inline int64_t bytes_of(PageFormat format, int64_t page_size, int64_t dim, int64_t rope_dim) {
  switch (format) {
    case PageFormat::kFloat32:
      return page_size * dim * 4;
    case PageFormat::kBFloat16:
      return page_size * dim * 2;
    case PageFormat::kFp8Rows:
      return fp8_page_bytes(page_size, dim, rope_dim);
    case PageFormat::kFp8Keys:
      return page_size * fp8_key_bytes(dim);
    default:
      return page_size * fp4_key_bytes(dim);
  }
}

// Pages in a scattered order, every third block of a sequence not stored, and two tables' worth of pages nobody has.
// shift: bytes before the first page, which then is not aligned.
struct PoolMemory {
  PageFormat format;
  int64_t page_size, dim, rope_dim, page_bytes, shift;
  DeviceTensor<uint8_t> pages;
  DeviceTensor<int32_t> table;
  std::vector<uint8_t> expected;

  PoolMemory(PageFormat the_format, int64_t sequences, int64_t blocks, int64_t the_page_size, int64_t the_dim,
             int64_t the_rope_dim, int64_t the_shift = 0)
      : format(the_format),
        page_size(the_page_size),
        dim(the_dim),
        rope_dim(the_rope_dim),
        page_bytes(bytes_of(format, page_size, dim, rope_dim)),
        shift(the_shift),
        pages({sequences * blocks + 2, page_bytes + shift}, 0, plain_bytes() > 0 ? plain_bytes() : 1),
        table({sequences, blocks}) {
    const int64_t count = sequences * blocks;
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = s * blocks + b;
        const int32_t missing[] = {-1, static_cast<int32_t>(count + 2), INT32_MIN, INT32_MAX};
        table.at(s, b) = at % 3 == 2 ? missing[at / 3 % 4] : static_cast<int32_t>(count - at);
      }
    }
    for (int64_t page = 0; page < pages.rows(); ++page) {
      for (int64_t i = 0; i < pages.inner(); ++i) pages.at(page, i) = 0x5A;
    }
    table.upload();
    pages.upload();
    expected.assign(static_cast<size_t>(pages.rows() * pages.inner()), 0x5A);
  }

  // Of an element; 0: pages of bytes.
  int64_t plain_bytes() const { return format == PageFormat::kFloat32 ? 4 : format == PageFormat::kBFloat16 ? 2 : 0; }

  // On the host the pool is `expected`.
  RowPool pool(bool on_host) {
    RowPool pool = {};
    uint8_t* data = (on_host ? expected.data() : pages.device()) + shift;
    const int64_t size = plain_bytes();
    const int64_t stride = on_host ? pages.inner() : pages.any<2>().stride[0];
    if (size > 0) {
      const DType dtype = size == 4 ? DType::kFloat32 : DType::kBFloat16;
      pool.plain = {data, dtype, {pages.rows(), page_size, dim}, {stride / size, dim, 1}};
    } else {
      pool.bytes = {data, DType::kUInt8, {pages.rows(), page_bytes}, {stride, 1}};
    }
    pool.table = view_of<2>(table, on_host);
    pool.page_size = page_size;
    return pool;
  }

  // The first byte that differs, or nothing.
  std::string wrong_bytes() {
    pages.download();
    if (!pages.intact() || !table.intact()) return "wrote outside of the pool";
    for (int64_t page = 0; page < pages.rows(); ++page) {
      for (int64_t i = 0; i < pages.inner(); ++i) {
        const int got = pages.at(page, i), wanted = expected[static_cast<size_t>(page * pages.inner() + i)];
        if (got == wanted) continue;
        return "page " + std::to_string(page) + " byte " + std::to_string(i - shift) + ": got " + std::to_string(got) +
               ", expected " + std::to_string(wanted);
      }
    }
    return "";
  }
};

}  // namespace dsv4::testing
