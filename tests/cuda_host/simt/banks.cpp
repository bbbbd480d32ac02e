#include "simt/banks.h"

#include <algorithm>
#include <set>

namespace dsv4::simt {
namespace {

constexpr int kBanks = 32;
std::map<std::tuple<std::string, int, int>, BankSite> sites;

}  // namespace

void WarpAccesses::add(int lane, Site site, uint32_t address, int bytes) {
  const Line line = {site.file, site.line, bytes};
  const auto pass = static_cast<size_t>(passes_[line][static_cast<size_t>(lane)]++);
  std::vector<Access>& passes = accesses_[line];
  if (passes.size() <= pass) passes.resize(pass + 1);
  passes[pass].address[static_cast<size_t>(lane)] = address;
  passes[pass].lanes |= 1u << lane;
}

void WarpAccesses::settle() {
  for (const auto& [line, passes] : accesses_) {
    const auto& [file, number, bytes] = line;
    BankSite& site = sites.try_emplace({file, number, bytes}, BankSite{file, number, bytes, 0, 0}).first->second;
    const int together = 128 / bytes;
    for (const Access& access : passes) {
      for (int first = 0; first < 32; first += together) {
        std::array<std::set<uint32_t>, kBanks> words;
        size_t most = 0;
        for (int lane = first; lane < first + together; ++lane) {
          if ((access.lanes >> lane & 1u) == 0) continue;
          for (int at = 0; at < bytes; at += 4) {
            const uint32_t word = (access.address[static_cast<size_t>(lane)] + static_cast<uint32_t>(at)) / 4;
            words[word % kBanks].insert(word);
            most = std::max(most, words[word % kBanks].size());
          }
        }
        site.phases += most > 0;
        site.cycles += static_cast<int64_t>(most);
      }
    }
  }
  accesses_.clear();
  passes_.clear();
}

std::vector<BankSite> bank_sites() {
  std::vector<BankSite> found;
  for (const auto& [line, site] : sites) found.push_back(site);
  return found;
}

void forget_bank_sites() { sites.clear(); }

}  // namespace dsv4::simt
