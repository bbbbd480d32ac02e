// Native callers' operands: of every op each is refused without memory, and with one element more along an axis than
// the others fit. What the numbers are does not matter here: floats are NaN, tables name no page.
#include <string>

#include "common/pages.h"
#include "common/thread_pool.h"
#include "native/check.h"
#include "ops/attention.h"
#include "ops/compress.h"
#include "ops/index.h"
#include "ops/linear.h"
#include "ops/mhc.h"
#include "ops/moe.h"
#include "ops/norm_rope.h"
#include "ops/quantize.h"

namespace {

using namespace dsv4;
using testing::Scratch;
using Floats = testing::Guarded<float>;
using Bytes = testing::Guarded<uint8_t>;

enum class Sizes { kBound, kFree };  // kFree: an axis may have any size

// `list(p, each)` calls each(name, view), or each(name, view, Sizes::kFree), for every operand of `good`, which
// `run(p, context)` accepts.
template <class Params, class Run, class List>
void check_operands(const std::string& op, const Params& good, const Run& run, const List& list) {
  ThreadPool pool(1);
  const Context context = pool.context();
  const Status accepted = run(good, context);
  CHECK_MESSAGE(accepted.is_ok(), accepted.message());
  int operands = 0;
  Params any = good;
  list(any, [&](const char*, auto&, Sizes = Sizes::kBound) { ++operands; });
  for (int chosen = 0; chosen < operands; ++chosen) {
    Params without = good;
    std::string name;
    int at = 0, axes = 0;
    list(without, [&](const char* operand, auto& view, Sizes sizes = Sizes::kBound) {
      if (at++ != chosen) return;
      name = operand, view.data = nullptr;
      axes = sizes == Sizes::kFree ? 0 : static_cast<int>(sizeof(view.shape) / sizeof(view.shape[0]));
    });
    const std::string message = run(without, context).message();
    CHECK_MESSAGE(message == op + ": " + name + " must not be null", op + " without " + name + ": " + message);
    for (int axis = 0; axis < axes; ++axis) {
      Params longer = good;
      at = 0;
      list(longer, [&](const char*, auto& view, Sizes = Sizes::kBound) {
        if (at++ == chosen) ++view.shape[axis];
      });
      CHECK_MESSAGE(!run(longer, context).is_ok(), op + ": axis " + std::to_string(axis) + " of " + name + " is free");
    }
  }
}

// The scratch memory that an op asks for.
template <class Params>
Scratch scratch_for(int64_t (*bytes)(const Params&, const Context&), const Params& p) {
  ThreadPool pool(1);
  return Scratch(bytes(p, pool.context()));
}

testing::Guarded<int32_t> integers(std::vector<int64_t> shape, int32_t first = 0, int32_t step = 0) {
  testing::Guarded<int32_t> result(std::move(shape));
  for (int64_t i = 0; i < result.size(); ++i) result[i] = first + step * static_cast<int32_t>(i);
  return result;
}

constexpr int64_t kTokens = 3, kHidden = 32;

struct MhcOperands {
  Floats sublayer{{kTokens, kHidden}}, streams{{kTokens, 4, kHidden}}, result{{kTokens, 4, kHidden}},
      post{{kTokens, 4}}, comb{{kTokens, 4, 4}}, fn{{24, 4 * kHidden}}, scale{{3}}, base{{24}}, weight{{kHidden}};
  Floats head_fn{{4, 4 * kHidden}}, head_scale{{1}}, head_base{{4}};
  Floats grad_sublayer{{kTokens, kHidden}}, grad_streams{{kTokens, 4, kHidden}}, grad_post{{kTokens, 4}},
      grad_comb{{kTokens, 4, 4}}, grad_fn{{24, 4 * kHidden}}, grad_weight{{kHidden}};
  Scratch scratch{1 << 22};  // more than any of them asks for

  MhcMixing mixing() { return {fn.const_view<2>(), scale.const_view<1>(), base.const_view<1>(), 0, 0, 2}; }
  MhcMixing head_mixing() {
    return {head_fn.const_view<2>(), head_scale.const_view<1>(), head_base.const_view<1>(), 0, 0, 2};
  }
  MhcPostParams post_params() {
    return {sublayer.any<2>(), streams.any<3>(), post.const_view<2>(), comb.const_view<3>(), result.any<3>()};
  }
  MhcPreParams pre_params(Floats& from) {
    return {from.any<3>(),       mixing(),           weight.any<1>(), 0, grad_sublayer.any<2>(), grad_post.view<2>(),
            grad_comb.view<3>(), scratch.workspace()};
  }
};

constexpr auto mixing_operands = [](MhcMixing& m, const auto& each) {
  each("fn", m.fn), each("scale", m.scale), each("base", m.base);
};
constexpr auto post_operands = [](MhcPostParams& p, const auto& each) {
  each("sublayer", p.sublayer), each("streams", p.streams), each("post", p.post), each("comb", p.comb);
  each("result", p.result);
};
constexpr auto pre_results = [](MhcPreParams& p, const auto& each) {
  mixing_operands(p.mixing, each), each("norm_weight", p.norm_weight);
  each("input", p.input), each("post", p.post), each("comb", p.comb);
};

TEST(mhc) {
  MhcOperands o;
  check_operands("mhc_post", o.post_params(), mhc_post, post_operands);
  check_operands("mhc_pre", o.pre_params(o.streams), mhc_pre,
                 [](auto& p, const auto& each) { each("streams", p.streams), pre_results(p, each); });
  const MhcPostPreParams both{o.post_params(), o.pre_params(o.result)};
  check_operands("mhc_post_pre", both, mhc_post_pre,
                 [](auto& p, const auto& each) { post_operands(p.post, each), pre_results(p.pre, each); });
  const MhcHeadParams head{o.streams.any<3>(), o.head_mixing(), o.sublayer.any<2>(), o.scratch.workspace()};
  check_operands("mhc_head", head, mhc_head, [](auto& p, const auto& each) {
    each("streams", p.streams), mixing_operands(p.mixing, each), each("output", p.output);
  });
}

TEST(mhc_backward) {
  MhcOperands o;
  const MhcPostBackwardParams post{o.result.any<3>(),       o.sublayer.any<2>(),    o.streams.any<3>(),
                                   o.post.const_view<2>(),  o.comb.const_view<3>(), o.grad_sublayer.any<2>(),
                                   o.grad_streams.any<3>(), o.grad_post.view<2>(),  o.grad_comb.view<3>()};
  check_operands("mhc_post_backward", post, mhc_post_backward, [](auto& p, const auto& each) {
    each("grad_result", p.grad_result), each("sublayer", p.sublayer), each("streams", p.streams);
    each("post", p.post), each("comb", p.comb), each("grad_sublayer", p.grad_sublayer);
    each("grad_streams", p.grad_streams), each("grad_post", p.grad_post), each("grad_comb", p.grad_comb);
  });
  Floats scale({3}), base({24}), head_fn({4, 4 * kHidden}), head_scale({1}), head_base({4});
  const MhcPreBackwardParams pre{o.sublayer.any<2>(),     o.post.const_view<2>(),
                                 o.comb.const_view<3>(),  o.result.any<3>(),
                                 o.streams.any<3>(),      o.mixing(),
                                 o.weight.any<1>(),       0,
                                 o.grad_streams.any<3>(), o.grad_fn.view<2>(),
                                 scale.view<1>(),         base.view<1>(),
                                 o.grad_weight.view<1>(), o.scratch.workspace()};
  check_operands("mhc_pre_backward", pre, mhc_pre_backward, [](auto& p, const auto& each) {
    each("grad_input", p.grad_input), each("grad_post", p.grad_post), each("grad_comb", p.grad_comb);
    each("grad_residual", p.grad_residual), each("streams", p.streams), mixing_operands(p.mixing, each);
    each("norm_weight", p.norm_weight), each("grad_streams", p.grad_streams), each("grad_fn", p.grad_fn);
    each("grad_scale", p.grad_scale), each("grad_base", p.grad_base), each("grad_norm_weight", p.grad_norm_weight);
  });
  const MhcHeadBackwardParams head{o.sublayer.any<2>(),     o.streams.any<3>(),   o.head_mixing(),
                                   o.grad_streams.any<3>(), head_fn.view<2>(),    head_scale.view<1>(),
                                   head_base.view<1>(),     o.scratch.workspace()};
  check_operands("mhc_head_backward", head, mhc_head_backward, [](auto& p, const auto& each) {
    each("grad_output", p.grad_output), each("streams", p.streams), mixing_operands(p.mixing, each);
    each("grad_streams", p.grad_streams), each("grad_fn", p.grad_fn), each("grad_scale", p.grad_scale);
    each("grad_base", p.grad_base);
  });
}

// A rope of all dims: it cannot have a pair more.
TEST(norms_and_rotations) {
  Floats rows({kTokens, kHidden}), result({kTokens, kHidden}), weight({kHidden}), rope({kTokens, kHidden / 2, 2});
  Floats heads({kTokens, 2, kHidden}), grad({kTokens, 2, kHidden}), rotated({kTokens, 2, kHidden}),
      frequency({kHidden / 2});
  auto position = integers({kTokens});
  const RmsNormParams norm{rows.any<2>(), weight.any<1>(), 0, result.any<2>()};
  check_operands("rms_norm", norm, rms_norm,
                 [](auto& p, const auto& each) { each("x", p.x), each("weight", p.weight), each("result", p.result); });
  const KvNormRopeParams kv{rows.any<2>(), weight.any<1>(), rope.any<3>(), 0, result.any<2>()};
  check_operands("kv_norm_rope", kv, kv_norm_rope, [](auto& p, const auto& each) {
    each("kv", p.kv), each("weight", p.weight), each("rope", p.rope), each("result", p.result);
  });
  const ApplyRopeParams turn{heads.any<3>(), rope.any<3>(), false, rotated.any<3>()};
  check_operands("apply_rope", turn, apply_rope,
                 [](auto& p, const auto& each) { each("x", p.x), each("rope", p.rope), each("result", p.result); });
  const RopeRowsParams table{position.any<1>(), frequency.any<1>(), rope.any<3>()};
  check_operands("rope_rows", table, rope_rows, [](auto& p, const auto& each) {
    each("position", p.position), each("inv_freq", p.frequency), each("result", p.result);
  });
  const QueryNormRopeParams query{heads.any<3>(), rope.any<3>(), 0, rotated.any<3>()};
  check_operands("query_norm_rope", query, query_norm_rope,
                 [](auto& p, const auto& each) { each("q", p.query), each("rope", p.rope), each("result", p.result); });
  const QueryNormRopeBackwardParams back{grad.any<3>(), heads.any<3>(), rope.any<3>(), 0, rotated.any<3>()};
  check_operands("query_norm_rope_backward", back, query_norm_rope_backward, [](auto& p, const auto& each) {
    each("grad", p.grad), each("q", p.query), each("rope", p.rope), each("result", p.result);
  });
}

TEST(gradients_of_norms) {
  Floats grad({kTokens, kHidden}), rows({kTokens, kHidden}), result({kTokens, kHidden}), weight({kHidden}),
      grad_weight({kHidden}), rope({kTokens, kHidden / 2, 2});
  NormRopeBackwardParams p{
      grad.any<2>(), rows.any<2>(), weight.any<1>(), {}, 0, result.any<2>(), grad_weight.any<1>(), {}};
  Scratch scratch = scratch_for(norm_rope_backward_workspace_bytes, p);
  p.workspace = scratch.workspace();
  check_operands("rms_norm_backward", p, rms_norm_backward, [](auto& q, const auto& each) {
    each("x", q.x), each("grad", q.grad), each("weight", q.weight), each("grad_weight", q.grad_weight);
    each("grad_x", q.grad_x);
  });
  p.rope = rope.any<3>();
  check_operands("kv_norm_rope_backward", p, kv_norm_rope_backward, [](auto& q, const auto& each) {
    each("kv", q.x), each("grad", q.grad), each("weight", q.weight), each("grad_weight", q.grad_weight);
    each("rope", q.rope), each("grad_kv", q.grad_x);
  });
}

// Pages of two rows, and where three rows of one sequence go.
struct Pool {
  Floats plain{{4, 2, kHidden}};
  testing::Guarded<int32_t> table = integers({2, 2}, -1), sequence = integers({kTokens}),
                            position = integers({kTokens}, 0, 1);

  RowPool rows() { return {plain.any<3>(), {}, table.any<2>(), 2}; }
};

TEST(window_rows) {
  Pool pool;
  Floats kv({kTokens, kHidden}), weight({kHidden}), rope({kTokens, kHidden / 2, 2});
  StoreWindowParams p{
      kv.any<2>(), weight.any<1>(), rope.any<3>(), pool.rows(), pool.sequence.any<1>(), pool.position.any<1>(), 0, {}};
  Scratch scratch = scratch_for(store_window_workspace_bytes, p);
  p.workspace = scratch.workspace();
  check_operands("store_window", p, store_window, [](auto& q, const auto& each) {
    each("kv", q.kv), each("weight", q.weight), each("rope", q.rope), each("pages", q.pool.plain, Sizes::kFree);
    each("table", q.pool.table, Sizes::kFree), each("sequence", q.sequence), each("position", q.position);
  });
}

constexpr auto compress_operands = [](auto& p, const auto& each) {
  each("kv", p.kv), each("gate", p.gate), each("ape", p.ape), each("norm_weight", p.norm_weight), each("rope", p.rope);
};

TEST(compressor) {
  Pool pool;
  const int64_t ratio = 2, entries = kTokens / ratio, channels = 2 * kHidden;
  Floats kv({kTokens, channels}), gate({kTokens, channels}), ape({ratio, channels}), weight({kHidden}),
      rope({kTokens, kHidden / 2, 2}), state({2, 4, 2, channels});
  CompressParams p{kv.const_view<2>(),
                   gate.const_view<2>(),
                   ape.const_view<2>(),
                   weight.any<1>(),
                   rope.any<3>(),
                   state.view<4>(),
                   pool.rows(),
                   pool.sequence.any<1>(),
                   pool.position.any<1>(),
                   ratio,
                   0,
                   false,
                   {}};
  Scratch scratch = scratch_for(compress_workspace_bytes, p);
  p.workspace = scratch.workspace();
  check_operands("compress", p, compress, [](auto& q, const auto& each) {
    compress_operands(q, each), each("state", q.state, Sizes::kFree), each("pages", q.pool.plain, Sizes::kFree);
    each("table", q.pool.table, Sizes::kFree), each("sequence", q.sequence), each("position", q.position);
  });

  Floats result({entries, kHidden}), entry_rope({entries, kHidden / 2, 2});
  CompressEntriesParams made{p.kv,  p.gate, p.ape, p.norm_weight,   entry_rope.any<3>(),
                             ratio, 0,      false, result.any<2>(), {}};
  Scratch entries_scratch = scratch_for(compress_entries_workspace_bytes, made);
  made.workspace = entries_scratch.workspace();
  check_operands("compress_entries", made, compress_entries,
                 [](auto& q, const auto& each) { compress_operands(q, each), each("result", q.result); });

  Floats grad({entries, kHidden}), grad_kv({kTokens, channels}), grad_gate({kTokens, channels}),
      grad_ape({ratio, channels}), grad_weight({kHidden});
  CompressEntriesBackwardParams back{
      grad.any<2>(), made, grad_kv.view<2>(), grad_gate.view<2>(), grad_ape.view<2>(), grad_weight.any<1>()};
  Scratch back_scratch = scratch_for(compress_entries_backward_workspace_bytes, back);
  back.forward.workspace = back_scratch.workspace();
  check_operands("compress_entries_backward", back, compress_entries_backward, [](auto& q, const auto& each) {
    compress_operands(q.forward, each), each("grad", q.grad), each("grad_kv", q.grad_kv);
    each("grad_gate", q.grad_gate), each("grad_ape", q.grad_ape), each("grad_norm_weight", q.grad_norm_weight);
  });
}

TEST(quantisers) {
  Floats x({kTokens, kHidden}), wide({1, kTokens, kHidden});
  Bytes codes({kTokens, kHidden}), half({kTokens, kHidden / 2}), scale({kTokens, 2});
  constexpr auto operands = [](auto& p, const auto& each) {
    each("x", p.x), each("codes", p.codes), each("scale", p.scale);
  };
  check_operands("quantize_fp8", QuantizeParams{x.any<2>(), 16, codes.any<2>(), scale.any<2>()}, quantize_fp8,
                 operands);
  check_operands("quantize_fp4", QuantizeParams{x.any<2>(), 16, half.any<2>(), scale.any<2>()}, quantize_fp4, operands);
  Bytes batch({1, kTokens, kHidden}), batch_half({1, kTokens, kHidden / 2}), batch_scale({1, kTokens, 2});
  constexpr auto inverse = [](auto& p, const auto& each) {
    each("codes", p.codes), each("scale", p.scale), each("result", p.result);
  };
  const DequantizeParams fp8{false, batch.any<3>(), batch_scale.any<3>(), 1, 16, wide.any<3>()};
  check_operands("dequantize_fp8", fp8, dequantize_fp8, inverse);
  check_operands("dequantize_weight", fp8, dequantize_weight, inverse);
  const DequantizeParams fp4{true, batch_half.any<3>(), batch_scale.any<3>(), 1, 16, wide.any<3>()};
  check_operands("dequantize_fp4", fp4, dequantize_fp4, inverse);
  Floats result({kTokens, kHidden});
  HadamardParams p{x.any<2>(), result.any<2>(), {}};
  Scratch scratch = scratch_for(hadamard_workspace_bytes, p);
  p.workspace = scratch.workspace();
  check_operands("hadamard", p, hadamard, [](auto& q, const auto& each) { each("x", q.x), each("result", q.result); });
}

TEST(indices) {
  Pool pool;
  Floats query({kTokens, 2, kHidden}), rope({kTokens, kHidden / 2, 2}), made({kTokens, 2, kHidden}),
      weights({kTokens, 2});
  auto lengths = integers({kTokens}), result = integers({kTokens, 4});
  check_operands(
      "index_query", IndexQueryParams{query.any<3>(), rope.any<3>(), made.any<3>()}, index_query,
      [](auto& p, const auto& each) { each("query", p.query), each("rope", p.rope), each("result", p.result); });
  IndexTopkParams p{query.any<3>(),
                    weights.const_view<2>(),
                    pool.plain.any<3>(),
                    {},
                    pool.table.any<2>(),
                    pool.sequence.any<1>(),
                    lengths.any<1>(),
                    4,
                    2,
                    result.any<2>(),
                    {}};
  Scratch scratch = scratch_for(index_topk_workspace_bytes, p);
  p.workspace = scratch.workspace();
  check_operands("index_topk", p, index_topk, [](auto& q, const auto& each) {
    each("query", q.query), each("weights", q.weights), each("pages", q.plain, Sizes::kFree);
    each("table", q.table, Sizes::kFree), each("sequence", q.sequence), each("lengths", q.lengths);
    each("result", q.result);
  });
}

TEST(linears) {
  Floats x({kTokens, 1, kHidden}), out({kTokens, 1, 64});
  Bytes fp8({64, kHidden}), fp4({64, kHidden / 2}), scale({1, 1}), fp4_scale({64, 1});
  constexpr auto operands = [](auto& p, const auto& each) {
    each("x", p.x), each("weight", p.weight), each("scale", p.scale), each("out", p.out);
  };
  LinearParams p{x.any<3>(), fp8.any<2>(), scale.any<2>(), out.any<3>(), {}};
  Scratch scratch(1 << 22);  // more than any of them asks for
  p.workspace = scratch.workspace();
  check_operands("fp8_linear", p, fp8_linear, operands);
  check_operands("grouped_linear", p, grouped_linear, operands);
  p.weight = fp4.any<2>(), p.scale = fp4_scale.any<2>();
  check_operands("fp4_linear", p, fp4_linear, operands);
  Floats row({kTokens, kHidden}), weight({64, kHidden}), result({kTokens, 64});
  const DenseLinearParams plain{row.any<2>(), weight.any<2>(), result.any<2>(), scratch.workspace()};
  check_operands("dense_linear", plain, dense_linear,
                 [](auto& q, const auto& each) { each("x", q.x), each("weight", q.weight), each("out", q.out); });
}

TEST(gate) {
  Floats x({kTokens, kHidden}), weight({4, kHidden}), bias({4}), weights({kTokens, 2});
  auto indices = integers({kTokens, 2}), token_ids = integers({kTokens}), table = integers({5, 2});
  Scratch scratch(1 << 20);
  MoeGateParams p{x.any<2>(),       weight.any<2>(),    2, bias.const_view<1>(), {}, {}, 1, weights.view<2>(),
                  indices.any<2>(), scratch.workspace()};
  check_operands("moe_gate", p, moe_gate, [](auto& q, const auto& each) {
    each("x", q.x), each("weight", q.weight), each("weights", q.weights), each("indices", q.indices);
  });
  MoeGateParams many = p;
  many.weight.shape[0] = int64_t{1} << 31;
  ThreadPool pool(1);
  CHECK(std::string(moe_gate(many, pool.context()).message()) == "moe_gate: weight has too many experts");
  p.bias = {}, p.token_ids = token_ids.any<1>(), p.tid2eid = table.any<2>();
  check_operands("moe_gate", p, moe_gate, [](auto& q, const auto& each) {
    each("token_ids", q.token_ids), each("tid2eid", q.tid2eid, Sizes::kFree);
  });
}

TEST(expert_map) {
  auto indices = integers({kTokens, 2}), offsets = integers({5}), rows = integers({6});
  check_operands(
      "moe_map", MoeMapParams{indices.any<2>(), 4, offsets.any<1>(), rows.any<1>()}, moe_map,
      [](auto& p, const auto& each) { each("indices", p.indices), each("offsets", p.offsets), each("rows", p.rows); });
}

TEST(experts) {
  Floats x({kTokens, kHidden}), weights({kTokens, 2}), result({kTokens, kHidden});
  auto indices = integers({kTokens, 2});
  Bytes w1({4, 64, kHidden}), w3 = w1, w2({4, kHidden, 64}), up_scale({4, 1, 1}), up_scale3 = up_scale,
                              down_scale = up_scale;
  Bytes shared1({1, 64, kHidden / 2}), shared3 = shared1, shared2({1, kHidden, 32}), shared1_scale({1, 64, 1}),
                                       shared3_scale = shared1_scale, shared2_scale({1, kHidden, 2});
  const auto matrix = [](WeightFormat format, Bytes& codes, Bytes& scale) {
    return ExpertMatrix{format, codes.any<3>(), scale.any<3>()};
  };
  MoeExpertsParams p{};
  p.x = x.any<2>(), p.weights = weights.const_view<2>(), p.indices = indices.any<2>(), p.result = result.any<2>();
  p.w1 = matrix(WeightFormat::kFp8, w1, up_scale), p.w3 = matrix(WeightFormat::kFp8, w3, up_scale3);
  p.w2 = matrix(WeightFormat::kFp8, w2, down_scale);
  p.shared[0] = matrix(WeightFormat::kFp4, shared1, shared1_scale);
  p.shared[1] = matrix(WeightFormat::kFp4, shared3, shared3_scale);
  p.shared[2] = matrix(WeightFormat::kFp4, shared2, shared2_scale);
  Scratch scratch = scratch_for(moe_experts_workspace_bytes, p);
  p.workspace = scratch.workspace();
  check_operands("moe_experts", p, moe_experts, [](auto& q, const auto& each) {
    each("x", q.x), each("weights", q.weights), each("indices", q.indices), each("result", q.result);
    each("w1", q.w1.data), each("w1_scale", q.w1.scale), each("w3", q.w3.data), each("w3_scale", q.w3.scale);
    each("w2", q.w2.data), each("w2_scale", q.w2.scale);
    each("shared w1", q.shared[0].data), each("shared w1_scale", q.shared[0].scale);
    each("shared w3", q.shared[1].data), each("shared w3_scale", q.shared[1].scale);
    each("shared w2", q.shared[2].data), each("shared w2_scale", q.shared[2].scale);
  });
}

TEST(expert_gradients) {
  Floats x({kTokens, kHidden}), grad({kTokens, kHidden}), weights({kTokens, 2}), grad_x({kTokens, kHidden}),
      grad_weights({kTokens, 2});
  auto indices = integers({kTokens, 2});
  Floats up({4, 64, kHidden}), gate = up, down({4, kHidden, 64}), shared_up({1, 64, kHidden}), shared_gate = shared_up,
                               shared_down({1, kHidden, 64});
  Floats grads[6] = {up, gate, down, shared_up, shared_gate, shared_down};
  MoeExpertsBackwardParams p{};
  p.grad = grad.any<2>(), p.x = x.any<2>(), p.weights = weights.const_view<2>(), p.indices = indices.any<2>();
  p.matrices[0] = up.any<3>(), p.matrices[1] = gate.any<3>(), p.matrices[2] = down.any<3>();
  p.shared[0] = shared_up.any<3>(), p.shared[1] = shared_gate.any<3>(), p.shared[2] = shared_down.any<3>();
  p.grad_x = grad_x.any<2>(), p.grad_weights = grad_weights.view<2>();
  for (int i = 0; i < 3; ++i) p.grad_matrices[i] = grads[i].any<3>(), p.grad_shared[i] = grads[3 + i].any<3>();
  Scratch scratch = scratch_for(moe_experts_backward_workspace_bytes, p);
  p.workspace = scratch.workspace();
  check_operands("moe_experts_backward", p, moe_experts_backward, [](auto& q, const auto& each) {
    each("x", q.x), each("grad", q.grad), each("weights", q.weights), each("indices", q.indices);
    each("grad_x", q.grad_x), each("grad_weights", q.grad_weights);
    const std::string names[] = {"w1", "w3", "w2"};
    for (int i = 0; i < 3; ++i) {
      each(names[i].c_str(), q.matrices[i]), each(("shared " + names[i]).c_str(), q.shared[i]);
      each(("grad_" + names[i]).c_str(), q.grad_matrices[i]);
      each(("grad_shared " + names[i]).c_str(), q.grad_shared[i]);
    }
  });
}

struct AttentionOperands {
  Pool window, compressed;
  Floats query{{kTokens, 2, kHidden}}, out{{kTokens, 2, kHidden}}, lse{{kTokens, 2}}, sink{{2}},
      rope{{kTokens, kHidden / 2, 2}};
  testing::Guarded<int32_t> lengths = integers({kTokens}), indices = integers({kTokens, 2});

  SparseAttentionParams params() {
    return {query.any<3>(),
            window.rows(),
            compressed.rows(),
            window.sequence.any<1>(),
            window.position.any<1>(),
            indices.any<2>(),
            lengths.any<1>(),
            sink.any<1>(),
            rope.any<3>(),
            kHidden / 2,
            4,
            1,
            out.any<3>(),
            lse.any<2>(),
            {}};
  }
};

constexpr auto attention_operands = [](SparseAttentionParams& p, const auto& each) {
  each("query", p.query), each("sequence", p.sequence), each("position", p.position), each("sink", p.sink);
  each("window_pages", p.window_pool.plain, Sizes::kFree), each("window_table", p.window_pool.table, Sizes::kFree);
  each("compressed_pages", p.compressed.plain, Sizes::kFree);
  each("compressed_table", p.compressed.table, Sizes::kFree), each("lengths", p.lengths);
  each("indices", p.indices, Sizes::kFree), each("rope", p.rope), each("lse", p.lse);
};

TEST(attention) {
  AttentionOperands o;
  SparseAttentionParams p = o.params();
  Scratch scratch = scratch_for(sparse_attention_workspace_bytes, p);
  p.workspace = scratch.workspace();
  check_operands("sparse_attention", p, sparse_attention,
                 [](auto& q, const auto& each) { attention_operands(q, each), each("out", q.out); });

  Floats grad_out({kTokens, 2, kHidden}), grad_lse({kTokens, 2}), grad_query({kTokens, 2, kHidden}), grad_sink({2});
  Floats grad_window = o.window.plain, grad_compressed = o.window.plain;
  SparseAttentionBackwardParams back{p,
                                     grad_out.any<3>(),
                                     grad_lse.any<2>(),
                                     grad_query.any<3>(),
                                     grad_window.any<3>(),
                                     grad_compressed.any<3>(),
                                     grad_sink.any<1>(),
                                     {}};
  Scratch back_scratch = scratch_for(sparse_attention_backward_workspace_bytes, back);
  back.workspace = back_scratch.workspace();
  check_operands("sparse_attention_backward", back, sparse_attention_backward, [](auto& q, const auto& each) {
    attention_operands(q.forward, each), each("grad_out", q.grad_out), each("grad_lse", q.grad_lse);
    each("grad_query", q.grad_query), each("grad_window", q.grad_window);
    each("grad_compressed", q.grad_compressed), each("grad_sink", q.grad_sink);
  });
}

}  // namespace
