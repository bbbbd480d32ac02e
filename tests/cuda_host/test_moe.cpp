// The sm80 mixture of experts against float64, tokens against themselves in other company and otherwise cut. Runs on
// the host model, and on a GPU where it is built for one.
#include "moe_stages.h"

namespace {

using namespace dsv4;
using namespace dsv4::testing;

constexpr WeightFormat kFormats[] = {WeightFormat::kPlain, WeightFormat::kFp8, WeightFormat::kFp4};
constexpr sm80::ExpertCut kCuts[] = {{4096, false, sm80::SharedTile::kFew, true},
                                     {4096, true, sm80::SharedTile::kMany, true},
                                     {4096, false, sm80::SharedTile::kSome, false},
                                     {4096, true, sm80::SharedTile::kFew, false},
                                     {3, false, sm80::SharedTile::kSome, false}};

std::string text(const MoeCase& c) {
  std::string words;
  for (const int64_t value :
       {c.tokens, c.hidden, c.inter, c.experts, c.top_k, static_cast<int64_t>(c.up), static_cast<int64_t>(c.down),
        static_cast<int64_t>(c.shared), c.shared_inter, c.pad, static_cast<int64_t>(c.gate)}) {
    words += std::to_string(value) + " ";
  }
  return words;
}

template <class X>
void check_case(const MoeCase& c, const sm80::ExpertCut* cut = nullptr) {
  const std::string wrong = try_moe<X>(c, cut);
  CHECK_MESSAGE(wrong.empty(), std::string(sizeof(X) == 2 ? "bfloat16 " : "float32 ") + text(c) + ": " + wrong);
}

template <class X>
void check_cuts(const MoeCase& c) {
  check_case<X>(c);
  for (const sm80::ExpertCut& cut : kCuts) check_case<X>(c, &cut);
}

TEST(nothing_to_do) {
  if (no_device()) return;
  check_case<bf16>({0});
  check_case<bf16>({3, 96, 72, 4, 0});
  check_case<bf16>({3, 96, 0, 4, 2});
  check_case<bf16>({3, 96, 72, 4, 2, WeightFormat::kFp4, WeightFormat::kFp4, WeightFormat::kNone});
}

TEST(formats) {
  if (no_device()) return;
  for (const WeightFormat up : kFormats) {
    for (const WeightFormat down : kFormats) {
      const WeightFormat shared = up == WeightFormat::kFp4 ? WeightFormat::kFp8 : down;
      check_cuts<bf16>({5, 96, 72, 6, 3, up, down, shared});
      check_cuts<float>({5, 96, 72, 6, 3, up, down, shared});
    }
  }
}

TEST(float32_scales) {
  if (no_device()) return;
  for (const WeightFormat format : {WeightFormat::kFp8, WeightFormat::kFp4}) {
    MoeCase c = {7, 160, 136, 4, 2, format, format, format};
    c.wide_scales = true;
    check_cuts<bf16>(c);
  }
}

// Where w1 is stored in another form than w3, of the routed experts, of the shared one, or of both.
TEST(gate_and_up_of_different_forms) {
  if (no_device()) return;
  for (const WeightFormat gate : kFormats) {
    for (const WeightFormat up : kFormats) {
      MoeCase c = {5, 96, 72, 6, 3, up, WeightFormat::kFp4, WeightFormat::kFp8};
      c.gate = gate;
      c.wide_gate = gate == up;
      check_cuts<bf16>(c);
      check_case<float>(c);
      c.down = WeightFormat::kPlain;
      check_case<float>(c, &kCuts[3]);
      c.shared = gate;
      for (const int64_t inter : {2, 126, 128, 130, 258}) {
        c.inter = inter;
        c.shared_inter = 260 - inter;
        c.hidden = 160;
        check_case<bf16>(c);
      }
    }
  }
  MoeCase none = {3, 96, 0, 4, 2, WeightFormat::kFp4, WeightFormat::kFp4, WeightFormat::kNone};
  none.gate = WeightFormat::kFp8;
  check_case<bf16>(none);
  none.tokens = 0;
  check_case<bf16>(none);
}

TEST(sizes) {
  if (no_device()) return;
  for (const WeightFormat format : kFormats) {
    for (const int64_t hidden : {2, 34, 126, 128, 130, 258}) check_case<bf16>({4, hidden, 40, 3, 2, format, format});
    for (const int64_t inter : {2, 34, 126, 128, 130, 258}) check_cuts<bf16>({3, 64, inter, 3, 2, format, format});
    check_cuts<bf16>({3, 144, 272, 3, 2, format, format, format, 160});
    // More blocks of K than all stages hold.
    check_cuts<bf16>({3, 1672, 136, 2, 1, format, format, format, 72});
    check_cuts<bf16>({3, 72, 1672, 2, 1, format, format, format, 1672});
  }
}

TEST(tokens) {
  if (no_device()) return;
  for (const int64_t tokens : {1, 2, 8, 9, 33}) check_cuts<bf16>({tokens, 64, 40, 3, 2});
  check_cuts<bf16>({70, 32, 16, 2, 2, WeightFormat::kFp8, WeightFormat::kFp8});
  check_case<bf16>({3, 32, 16, 40, 9});
}

TEST(rows_that_do_not_lie_densely) {
  if (no_device()) return;
  for (const WeightFormat format : kFormats) {
    for (const int64_t pad : {1, 8}) {
      MoeCase c = {5, 96, 72, 4, 2, format, format, format};
      c.pad = pad;
      check_case<bf16>(c);
      check_case<float>(c);
    }
  }
}

#if !defined(DSV4_ON_GPU)

TEST(offsets_beyond_32_bits) {
  const RowsApart apart;
  for (const WeightFormat format : kFormats) {
    for (const bool wide_scales : {false, true}) {
      MoeCase c = {5, 96, 72, 4, 2, format, format, format};
      c.wide_scales = wide_scales;
      check_cuts<bf16>(c);
      check_cuts<float>(c);
    }
  }
}

#endif

TEST(limits) {
  if (no_device()) return;
  for (const float limit : {0.0f, 0.05f, 10.0f}) {
    MoeCase c = {4, 128, 64, 4, 2, WeightFormat::kPlain, WeightFormat::kPlain, WeightFormat::kPlain};
    c.limit = limit;
    check_case<float>(c);
    check_case<bf16>(c);
  }
}

TEST(a_token_does_not_depend_on_cut_or_company) {
  if (no_device()) return;
  for (int kind = 0; kind < 4; ++kind) {
    const WeightFormat format = kFormats[kind % 3];
    MoeCase whole = {40, 160, 136, 4, 3, format, format, WeightFormat::kFp8, 72};
    if (kind == 3) whole.gate = WeightFormat::kFp4;  // of another form than w3
    MoeProblem<bf16> all(whole);
    CHECK(all.run().empty());
    for (const sm80::ExpertCut& cut : kCuts) {
      for (const int64_t tokens : {1, 7, 40}) {
        MoeCase few = whole;
        few.tokens = tokens;
        MoeProblem<bf16> p(few);
        const std::string fault = p.run(&cut);
        CHECK_MESSAGE(fault.empty(), fault);
        for (int64_t t = 0; t < tokens; ++t) CHECK(p.bits_of(t) == all.bits_of(t));
      }
    }
    // Beside tokens of NaN for the same experts.
    MoeProblem<bf16> spoilt(whole);
    for (int64_t t = 0; t < 40; t += 2) {
      for (int64_t i = 0; i < whole.hidden; ++i) spoilt.x.at(t, i) = from_float<bf16>(NAN);
    }
    spoilt.upload();
    CHECK(spoilt.run(&kCuts[1]).empty());
    for (int64_t t = 1; t < 40; t += 2) CHECK(spoilt.bits_of(t) == all.bits_of(t));
    CHECK(std::isnan(to_float(spoilt.result.at(0, 3))));
  }
}

// The order of a token's slots does not show, that of the experts does not change.
TEST(slots_in_any_order) {
  if (no_device()) return;
  const MoeCase c = {6, 96, 72, 6, 4, WeightFormat::kFp8, WeightFormat::kFp8};
  MoeProblem<bf16> p(c), turned(c);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t k = 0; k < 4; ++k) p.indices.at(t, k) = static_cast<int32_t>((t + k * 5) % 6);
    for (int64_t k = 0; k < 4; ++k) {
      turned.indices.at(t, k) = p.indices.at(t, 3 - k);
      turned.weights.at(t, k) = p.weights.at(t, 3 - k);
    }
  }
  p.upload();
  turned.upload();
  CHECK(p.run().empty());
  CHECK(turned.run().empty());
  for (int64_t t = 0; t < c.tokens; ++t) CHECK(p.bits_of(t) == turned.bits_of(t));
}

TEST(wide_indices) {
  if (no_device()) return;
  const MoeCase c = {6, 96, 72, 6, 3};
  MoeProblem<bf16> narrow(c), wide(c);
  CHECK(narrow.run().empty());
  DeviceBytes memory(6 * 3 * 8);
  for (int64_t t = 0; t < 6; ++t) {
    for (int64_t k = 0; k < 3; ++k) {
      const int64_t e = wide.indices.at(t, k);
      static_cast<int64_t*>(memory.host())[t * 3 + k] = e < 0 ? (int64_t{1} << 32) : e;
    }
  }
  memory.upload();
  MoeExpertsParams p = wide.params();
  p.indices.data = memory.device();
  p.indices.dtype = DType::kInt64;
  CHECK(wide.run(p, nullptr).empty());
  for (int64_t t = 0; t < 6; ++t) CHECK(wide.bits_of(t) == narrow.bits_of(t));
}

// ---- The map ----

void check_map(int64_t tokens, int64_t top_k, int64_t experts, uint64_t seed) {
  DeviceTensor<int32_t> indices({tokens, top_k}), offsets({experts + 1}), rows({tokens * top_k});
  Random random(seed);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < top_k; ++k) {
      indices.at(t, k) = static_cast<int32_t>((random.bits() >> 20) % static_cast<uint64_t>(experts + 3)) - 1;
    }
  }
  indices.upload();
  MoeMapParams p = {indices.any<2>(), experts, offsets.any<1>(), rows.any<1>()};
  p.indices.dtype = p.offsets.dtype = p.rows.dtype = DType::kInt32;
  const Status status = moe_map(p, cuda_context());
  CHECK_MESSAGE(status.is_ok(), status.message());
  CHECK(finish_device());
  offsets.download();
  rows.download();
  CHECK(offsets.intact() && rows.intact());
  int64_t row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    CHECK(offsets.at(e) == row);
    for (int64_t pair = 0; pair < tokens * top_k; ++pair) {
      if (indices.at(pair / top_k, pair % top_k) == e) CHECK(rows.at(row++) == pair);
    }
  }
  CHECK(offsets.at(experts) == row);
  for (; row < tokens * top_k; ++row) CHECK(rows.at(row) == -1);
}

TEST(map) {
  if (no_device()) return;
  for (const int64_t tokens : {0, 1, 5, 43, 300}) {
    for (const int64_t experts : {1, 7, 33}) check_map(tokens, 6, experts, static_cast<uint64_t>(tokens + experts));
  }
  check_map(3, 0, 4, 1);
  check_map(257, 1, 3, 2);
}

// ---- The gate ----

struct GateProblem {
  int64_t tokens, hidden, experts, top_k;
  DeviceTensor<bf16> x;
  DeviceTensor<float> weight, bias, weights;
  DeviceTensor<int32_t> indices, ids, table;
  bool biased = true, hashed = false;

  GateProblem(int64_t t, int64_t d, int64_t e, int64_t k)
      : tokens(t),
        hidden(d),
        experts(e),
        top_k(k),
        x({t, d}),
        weight({e, d}),
        bias({e}),
        weights({t, k}),
        indices({t, k}),
        ids({t}),
        table({50, k}) {
    for (int64_t i = 0; i < t; ++i) {
      Random random(static_cast<uint64_t>(i) + 100);
      for (int64_t j = 0; j < d; ++j) x.at(i, j) = from_float<bf16>(random.uniform(-2, 2));
      ids.at(i) = static_cast<int32_t>(random.uniform(0, 50));
    }
    Random random(3);
    weight.fill(random, -0.3f, 0.3f);
    bias.fill(random, -0.2f, 0.2f);
    for (int64_t i = 0; i < 50; ++i) {
      for (int64_t j = 0; j < k; ++j) table.at(i, j) = static_cast<int32_t>(random.uniform(0, static_cast<float>(e)));
    }
    upload();
  }
  void upload() {
    x.upload();
    weight.upload();
    bias.upload();
    ids.upload();
    table.upload();
  }

  std::string run() {
    MoeGateParams p = {};
    p.x = x.any<2>();
    p.weight = weight.any<2>();
    p.top_k = top_k;
    if (biased && !hashed) p.bias = bias.const_view<1>();
    if (hashed) {
      p.token_ids = ids.any<1>();
      p.tid2eid = table.any<2>();
      p.token_ids.dtype = p.tid2eid.dtype = DType::kInt32;
    }
    p.route_scale = 1.5;
    p.weights = weights.view<2>();
    p.indices = indices.any<2>();
    p.indices.dtype = DType::kInt32;
    const int64_t bytes = moe_gate_workspace_bytes(p, cuda_context());
    DeviceBytes memory(static_cast<size_t>(bytes) + 64);
    p.workspace = {reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.device()) + 63) / 64 * 64), bytes};
    const Status status = moe_gate(p, cuda_context());
    if (!status.is_ok()) return status.message();
    if (!finish_device()) return "the kernel failed";
    weights.download();
    indices.download();
    return x.intact() && weight.intact() && bias.intact() && weights.intact() && indices.intact() && memory.intact()
               ? ""
               : "wrote outside its outputs";
  }

  double score(int64_t t, int64_t e) {
    double z = 0;
    for (int64_t i = 0; i < hidden; ++i) z += static_cast<double>(to_float(x.at(t, i))) * weight.at(e, i);
    return z < -40 ? std::exp(z / 2) : std::sqrt(z > 20 ? z : std::log1p(std::exp(z)));
  }

  // What is wrong, or nothing: each choice at most 2e-6 behind the best that is left, weights to 2e-6.
  std::string wrong() {
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> scores, ranked;
      for (int64_t e = 0; e < experts; ++e) scores.push_back(score(t, e));
      ranked = scores;
      for (int64_t e = 0; e < experts; ++e) ranked[static_cast<size_t>(e)] += biased && !hashed ? bias.at(e) : 0;
      double total = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t chosen = indices.at(t, k);
        if (hashed) {
          if (chosen != table.at(ids.at(t), k)) return "token " + std::to_string(t) + " is not in the table so";
        } else {
          if (chosen < 0 || chosen >= experts) return "token " + std::to_string(t) + " chose nobody";
          const double best = *std::max_element(ranked.begin(), ranked.end());
          if (!(ranked[static_cast<size_t>(chosen)] >= best - 2e-6))
            return "token " + std::to_string(t) + " chose wrong";
          ranked[static_cast<size_t>(chosen)] = -INFINITY;
        }
        total += scores[static_cast<size_t>(chosen)];
      }
      for (int64_t k = 0; k < top_k; ++k) {
        const double expected = scores[static_cast<size_t>(indices.at(t, k))] / total * 1.5;
        if (!(std::fabs(weights.at(t, k) - expected) <= 2e-6 * expected)) return "weight of token " + std::to_string(t);
      }
    }
    return "";
  }
};

void check_gate(GateProblem& p) {
  const std::string fault = p.run(), wrong = fault.empty() ? p.wrong() : fault;
  CHECK_MESSAGE(wrong.empty(), wrong);
}

TEST(gate) {
  if (no_device()) return;
  for (const int64_t tokens : {0, 1, 5, 33}) {
    for (const int64_t experts : {1, 7, 32, 33, 70}) {
      GateProblem p(tokens, 72, experts, std::min<int64_t>(experts, 6));
      check_gate(p);
      p.biased = false;
      check_gate(p);
      p.hashed = true;
      check_gate(p);
    }
  }
  GateProblem all(3, 200, 40, 40);  // more choices than lanes
  check_gate(all);
}

TEST(ties_go_to_the_lower_expert_and_nan_comes_last) {
  if (no_device()) return;
  GateProblem p(2, 32, 70, 5);
  for (int64_t e = 0; e < 70; ++e) {
    for (int64_t i = 0; i < 32; ++i) p.weight.at(e, i) = e == 3 || e == 40 ? NAN : e == 66 ? 0.25f : 0.0f;
    p.bias.at(e) = e == 5 ? NAN : e == 35 || e == 36 ? 3.0f : 0.0f;
  }
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t i = 0; i < 32; ++i) p.x.at(t, i) = from_float<bf16>(t == 0 ? 1.0f : -1.0f);
  }
  p.upload();
  CHECK(p.run().empty());
  const int32_t first[] = {35, 36, 66, 0, 1}, second[] = {35, 36, 0, 1, 2};
  for (int64_t k = 0; k < 5; ++k) CHECK(p.indices.at(0, k) == first[k] && p.indices.at(1, k) == second[k]);
  GateProblem few(1, 32, 4, 4);
  for (int64_t e = 0; e < 4; ++e) few.bias.at(e) = e % 2 == 0 ? NAN : 0.0f;
  for (int64_t i = 0; i < 4 * 32; ++i) few.weight.at(i / 32, i % 32) = 0;
  few.upload();
  CHECK(few.run().empty());
  const int32_t last[] = {1, 3, 0, 2};
  for (int64_t k = 0; k < 4; ++k) CHECK(few.indices.at(0, k) == last[k]);
}

TEST(scores_do_not_underflow) {
  if (no_device()) return;
  GateProblem p(1, 32, 4, 3);
  p.biased = false;
  for (int64_t i = 0; i < 32; ++i) {
    p.x.at(0, i) = from_float<bf16>(1.0f);
    for (int64_t e = 0; e < 4; ++e) p.weight.at(e, i) = -4.0f - static_cast<float>(e) / 64;
  }
  p.upload();
  check_gate(p);
  CHECK(p.weights.at(0, 0) > p.weights.at(0, 1) && p.weights.at(0, 1) > 0);
}

TEST(ids_that_are_none) {
  if (no_device()) return;
  GateProblem p(4, 32, 5, 2);
  p.hashed = true;
  p.ids.at(0) = -1, p.ids.at(1) = 50, p.ids.at(2) = 7;
  p.table.at(7, 0) = 5, p.table.at(7, 1) = 4;
  p.upload();
  CHECK(p.run().empty());
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t k = 0; k < 2; ++k) CHECK(p.indices.at(t, k) == -1 && p.weights.at(t, k) == 0);
  }
  CHECK(p.indices.at(2, 0) == -1 && p.weights.at(2, 0) == 0);
  CHECK(p.indices.at(2, 1) == 4 && p.weights.at(2, 1) == 1.5f);
}

TEST(a_token_is_routed_alike_in_any_company) {
  if (no_device()) return;
  GateProblem all(35, 328, 20, 6);
  CHECK(all.run().empty());
  for (const int64_t tokens : {1, 9, 20}) {
    GateProblem p(tokens, 328, 20, 6);
    CHECK(p.run().empty());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = 0; k < 6; ++k) {
        CHECK(p.indices.at(t, k) == all.indices.at(t, k) && p.weights.at(t, k) == all.weights.at(t, k));
      }
    }
  }
}

// ---- The list of candidates leads here ----

TEST(the_op_runs_the_kernel) {
  if (no_device()) return;
  const MoeCase c = {4, 96, 72, 5, 2};
  MoeProblem<bf16> direct(c), dispatched(c);
  CHECK(direct.run().empty());
  MoeExpertsParams p = dispatched.params();
  const int64_t bytes = moe_experts_workspace_bytes(p, cuda_context());
  CHECK(bytes > 0);
  DeviceBytes memory(static_cast<size_t>(bytes) + 64);
  p.workspace = {reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.device()) + 63) / 64 * 64), bytes};
  const Status status = moe_experts(p, cuda_context());
  CHECK_MESSAGE(status.is_ok(), status.message());
  CHECK(finish_device());
  dispatched.result.download();
  for (int64_t t = 0; t < c.tokens; ++t) CHECK(dispatched.bits_of(t) == direct.bits_of(t));
}

TEST(cuts) {
  if (no_device()) return;
  MoeProblem<bf16> p({1, 32, 16, 4, 2});
  MoeExpertsParams params = p.params();
  params.x.shape[0] = 1;
  params.w1.data.shape[0] = 256;
  params.weights.shape[1] = 6;
  sm80::ExpertCut cut = sm80::expert_cut(params);
  CHECK(cut.tokens == 1 && !cut.many && cut.shared == sm80::SharedTile::kFew && cut.tile_at_row);
  params.x.shape[0] = 64;
  cut = sm80::expert_cut(params);
  CHECK(!cut.many && cut.shared == sm80::SharedTile::kSome && !cut.tile_at_row);
  params.shared[0].data.shape[1] = 2048;
  for (const int64_t tokens : {8, 9, 192, 193}) {
    params.x.shape[0] = tokens;
    const sm80::SharedTile tile = sm80::expert_cut(params).shared;
    CHECK(tile == (tokens == 8     ? sm80::SharedTile::kFew
                   : tokens <= 192 ? sm80::SharedTile::kSome
                                   : sm80::SharedTile::kMany));
  }
  params.x.shape[0] = 10000;
  cut = sm80::expert_cut(params);
  CHECK(cut.tokens == 4096 && cut.many && cut.shared == sm80::SharedTile::kMany && !cut.tile_at_row);
  params = p.params();
  params.workspace = {};
  CHECK(std::string(sm80::moe_experts(params, cuda_context()).message()).find("workspace has 0 bytes, needs") !=
        std::string::npos);
}

}  // namespace
