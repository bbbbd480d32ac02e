#include "simt/block.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>

namespace dsv4::simt {
namespace {

Options options;
Counters total;
std::vector<SyncSite> sites;
Block* running = nullptr;

// Stacks outlive blocks: mapping one costs far more than a small kernel.
std::vector<std::unique_ptr<Fiber>>& fiber_pool() {
  static std::vector<std::unique_ptr<Fiber>> pool;
  return pool;
}

}  // namespace

void configure(const Options& o) { options = o; }
Counters& counters() { return total; }
std::vector<SyncSite> sites_met() { return sites; }
void forget_sites() { sites.clear(); }
Block& block() { return *running; }

bool skipped(const char* kind, Site site) {
  bool known = false;
  for (const SyncSite& s : sites) known = known || (s.line == site.line && s.file == site.file);
  if (!known) sites.push_back({kind, site.file, site.line});
  return options.skip_file != nullptr && site.line == options.skip_line && options.skip_file == std::string(site.file);
}

std::string describe(Site site) {
  const std::string file = site.file;
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line);
}

Block::Block(const cuda::LaunchShape& shape, const Options& o, std::mt19937_64& random)
    : options_(o),
      random_(random),
      threads_(static_cast<size_t>(shape.threads)),
      fibers_(fiber_pool()),
      warps_(static_cast<size_t>((shape.threads + 31) / 32)),
      barriers_(16),
      warp_order_(warps_.size()),
      shared_bytes_(shape.shared_bytes) {
  while (fibers_.size() < threads_.size()) fibers_.push_back(std::make_unique<Fiber>());
  std::iota(warp_order_.begin(), warp_order_.end(), 0);
}

void Block::fiber_entry(void* argument) {
  Block& block = *static_cast<Block*>(argument);
  (*block.body_)();
  Thread& thread = block.current();
  bool pending = !thread.uncommitted.empty();
  for (const auto& group : thread.groups) pending = pending || !group.empty();
  if (pending) block.fail(thread.where, "the thread ended with asynchronous copies that it did not wait for");
  thread.done = true;
  thread.fiber->leave();
}

std::string Block::run(const std::function<void()>& body, int64_t x, int64_t y) {
  running = this;
  body_ = &body;
  index_[0] = x;
  index_[1] = y;
  fault_.clear();
  const int count = static_cast<int>(threads_.size());
  shared_.reset(shared_bytes_, random_);
  clocks_.assign(threads_.size() * threads_.size(), 0);
  warps_.assign(warps_.size(), Warp());
  barriers_.assign(barriers_.size(), Barrier());
  ready_.clear();
  for (int t = 0; t < count; ++t) {
    threads_[t] = Thread();
    threads_[t].index = t;
    threads_[t].fiber = fibers_[t].get();
    threads_[t].fiber->start(fiber_entry, this);
    advance(t);
    ready_.push_back(t);
  }
  std::shuffle(warp_order_.begin(), warp_order_.end(), random_);
  int left = count;
  while (left > 0 && fault_.empty()) {
    if (ready_.empty()) {
      fault_ = deadlock();
      break;
    }
    current_ = &threads_[pick()];
    current_->fiber->enter();
    if (current_->done) --left;
  }
  for (Warp& warp : warps_) warp.accesses.settle();
  ++total.blocks;
  return fault_;
}

int Block::pick() {
  size_t chosen = 0;
  if (options_.schedule == Schedule::kRandom) {
    chosen = random_() % ready_.size();
  } else if (options_.schedule == Schedule::kPriority) {
    if (random_() % 256 == 0) std::shuffle(warp_order_.begin(), warp_order_.end(), random_);
    const size_t start = random_() % ready_.size();  // any lane of the warp
    chosen = start;
    for (size_t i = 0; i < ready_.size(); ++i) {
      const size_t candidate = (start + i) % ready_.size();
      if (warp_order_[ready_[candidate] / 32] < warp_order_[ready_[chosen] / 32]) chosen = candidate;
    }
  }
  const int thread = ready_[chosen];
  if (options_.schedule == Schedule::kRoundRobin) {
    ready_.erase(ready_.begin());
  } else {
    ready_[chosen] = ready_.back();
    ready_.pop_back();
  }
  return thread;
}

void Block::maybe_yield() {
  if (options_.schedule != Schedule::kRandom || random_() % 16 != 0) return;
  ready_.push_back(current_->index);
  current_->fiber->leave();
}

void Block::count_banks(Site site, uint32_t address, int bytes) {
  if (options_.count_banks) warps_[current_->index / 32].accesses.add(current_->index % 32, site, address, bytes);
}

void Block::wait(const char* what, Site site) {
  current_->waits_for = what;
  current_->where = site;
  current_->fiber->leave();
}

void Block::wake(int thread) {
  threads_[thread].waits_for = nullptr;
  if (&threads_[thread] != current_) ready_.push_back(thread);
}

void Block::fail(Site site, const std::string& message) {
  char position[96];
  snprintf(position, sizeof(position), " (block %lld, %lld, thread %d)", static_cast<long long>(index_[0]),
           static_cast<long long>(index_[1]), current_->index);
  fault_ = message + position + (site.file ? " at " + describe(site) : "");
  current_->fiber->leave();
  __builtin_unreachable();
}

void Block::join_clocks(const std::vector<int>& members) {
  const size_t n = threads_.size();
  std::vector<uint32_t> joined(n, 0);
  for (const int t : members) {
    const uint32_t* mine = clock(t);
    for (size_t i = 0; i < n; ++i) joined[i] = std::max(joined[i], mine[i]);
  }
  for (const int t : members) {
    std::copy(joined.begin(), joined.end(), clock(t));
    advance(t);
  }
}

void Block::barrier(const char* kind, int id, int threads, Site site) {
  Barrier& barrier = barriers_[id];
  if (barrier.arrived.empty()) barrier.expected = threads;
  if (barrier.expected != threads) fail(site, "threads disagree on how many meet at this barrier");
  current_->where = site;
  barrier.arrived.push_back(current_->index);
  if (static_cast<int>(barrier.arrived.size()) < barrier.expected) return wait(kind, site);
  std::vector<int> lanes(warps_.size(), 0), lines(warps_.size(), 0);
  for (const int t : barrier.arrived) {
    if (lanes[t / 32]++ == 0) lines[t / 32] = threads_[t].where.line;
    if (threads_[t].where.line != lines[t / 32]) fail(site, "a warp's lanes are at different barriers");
  }
  for (size_t w = 0; w < lanes.size(); ++w) {
    const int whole = std::min(32, static_cast<int>(threads_.size() - 32 * w));
    if (lanes[w] != 0 && lanes[w] != whole) fail(site, "a warp came to the barrier without all its lanes");
    if (lanes[w] != 0) warps_[w].accesses.settle();
  }
  join_clocks(barrier.arrived);
  for (const int t : barrier.arrived) wake(t);
  barrier.arrived.clear();
}

void Block::collective(Collective kind, const char* name, Site site, const Lane& lane) {
  const int first = current_->index / 32 * 32;
  const int lanes = std::min(32, static_cast<int>(threads_.size()) - first);
  Warp& warp = warps_[first / 32];
  if (warp.arrived > 0 && (warp.kind != kind || warp.site.line != site.line)) {
    fail(site, std::string("diverged: other lanes of the warp are at ") + describe(warp.site));
  }
  warp.kind = kind;
  warp.site = site;
  warp.lane[current_->index % 32] = lane;
  if (++warp.arrived < lanes) return wait(name, site);
  if (lanes < 32) fail(site, "whole warps only: the block's last warp has fewer than 32 lanes");
  warp.accesses.settle();
  perform(warp, first, lanes);
  warp.arrived = 0;
  for (int l = 0; l < lanes; ++l) wake(first + l);
}

std::string Block::deadlock() const {
  std::map<std::string, std::vector<int>> waiting;
  int ended = 0;
  for (const Thread& t : threads_) {
    ended += t.done;
    if (!t.done) waiting[std::string(t.waits_for) + " at " + describe(t.where)].push_back(t.index);
  }
  std::string message = "deadlock:";
  for (const auto& [what, members] : waiting) {
    message += " threads " + std::to_string(members.front()) + ".." + std::to_string(members.back()) + " (" +
               std::to_string(members.size()) + ") wait in " + what + ";";
  }
  return message + " " + std::to_string(ended) + " threads have ended";
}

Status run(const char* kernel, const cuda::LaunchShape& shape, const std::function<void()>& body) {
  if (shape.threads < 1 || shape.threads > 1024 || shape.blocks_x < 1 || shape.blocks_x > cuda::kMaxBlocks ||
      shape.blocks_y < 1 || shape.blocks_y > 65535 || shape.shared_bytes < 0 ||
      shape.shared_bytes > cuda::kMaxSharedBytes) {
    return Status::error("%s: invalid launch: %lld x %lld blocks of %d threads, %d bytes of shared memory", kernel,
                         static_cast<long long>(shape.blocks_x), static_cast<long long>(shape.blocks_y), shape.threads,
                         shape.shared_bytes);
  }
  if (options.launch_only) return Status::ok();
  std::mt19937_64 random(options.seed);
  Block block(shape, options, random);
  std::vector<int64_t> order(static_cast<size_t>(shape.blocks_x * shape.blocks_y));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t index : order) {
    const std::string fault = block.run(body, index % shape.blocks_x, index / shape.blocks_x);
    if (!fault.empty()) return Status::error("%s: %s", kernel, fault.c_str());
  }
  return Status::ok();
}

}  // namespace dsv4::simt
