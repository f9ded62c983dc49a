// Drives the CPU kernels of vq over odd shapes against plain double-precision loops, with every tensor flush
// against a page that faults. Built by tests/test_native.py, also under the sanitizers.
//
// Prints one line a failure and exits 1 if there was one; "ok N" otherwise.
#include "lct/vq.h"

#include <algorithm>
#include <limits>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/vq_filter.h"
#include "guarded.h"

namespace {

int failures = 0;
int checks = 0;

void expect(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  std::printf("%s\n", what.c_str());
  ++failures;
}

bool near(double a, double b, double scale) { return std::fabs(a - b) <= 1e-6 * scale + 1e-30; }

struct Shape {
  int64_t rows, groups, codewords, depth, slots;
};

int64_t bits_of(int64_t codewords) {
  int64_t bits = 0;
  while ((int64_t{1} << bits) < codewords) ++bits;
  return bits;
}

int64_t code_at(const uint8_t* stream, int64_t index, int64_t bits) {
  int64_t code = 0;
  for (int64_t i = 0; i < bits; ++i) {
    const int64_t bit = index * bits + i;
    code |= static_cast<int64_t>(stream[bit / 8] >> bit % 8 & 1) << i;
  }
  return code;
}

// All that one call of the encoder gives.
struct Encoding {
  Encoding(const Shape& s, bool at_end)
      : codes((s.rows * s.groups * bits_of(s.codewords) + 7) / 8, at_end),
        counts(s.groups * s.codewords * 8, at_end),
        sums(s.groups * s.codewords * s.depth * 4, at_end),
        squared_error(4, at_end),
        candidates(s.groups * s.slots * s.depth * 4, at_end),
        candidate_scores(s.groups * s.slots * 4, at_end),
        flag(1, at_end) {}
  std::vector<char> bytes() const {
    std::vector<char> all;
    for (const Guarded* each : {&codes, &counts, &sums, &squared_error, &candidates, &candidate_scores, &flag}) {
      const std::vector<char> part = each->bytes();
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }
  Guarded codes, counts, sums, squared_error, candidates, candidate_scores, flag;
};

void check(const Shape& s, Tensor& x, const float* codebook, Encoding& out, const std::string& at) {
  const int64_t D = s.depth, K = s.codewords, bits = bits_of(K);
  std::vector<double> sums(static_cast<size_t>(s.groups * K * D)), sizes(sums.size());
  std::vector<int64_t> counts(static_cast<size_t>(s.groups * K));
  double total = 0;
  bool flag = false;
  for (int64_t n = 0; n < s.rows; ++n)
    for (int64_t g = 0; g < s.groups; ++g) {
      double smallest = INFINITY, scale = 0;
      const int64_t code = code_at(out.codes.as<uint8_t>(), n * s.groups + g, bits);
      double chosen = INFINITY;
      for (int64_t k = 0; k < K; ++k) {
        double distance = 0;
        for (int64_t d = 0; d < D; ++d) {
          const double a = x.get((n * s.groups + g) * D + d), c = codebook[(g * K + k) * D + d];
          distance += (a - c) * (a - c);
          scale = std::fmax(scale, D * (a * a + c * c));
        }
        smallest = std::fmin(smallest, distance);
        if (k == code) chosen = distance;
      }
      // Floats overflow where doubles do not.
      if (!(smallest <= std::numeric_limits<float>::max())) {
        flag = true;
        expect(code == 0, at + "a vector that is not finite has no code 0");
        continue;
      }
      expect(chosen <= smallest + 1e-6 * scale, at + "a word that is not the nearest");
      if (code >= K) continue;
      total += chosen;
      ++counts[static_cast<size_t>(g * K + code)];
      for (int64_t d = 0; d < D; ++d) {
        const double a = x.get((n * s.groups + g) * D + d);
        sums[static_cast<size_t>((g * K + code) * D + d)] += a;
        sizes[static_cast<size_t>((g * K + code) * D + d)] += std::fabs(a);
      }
    }
  expect(*out.flag.as<uint8_t>() == (flag ? 1 : 0), at + "the flag");
  expect(near(*out.squared_error.as<float>(), total, total), at + "squared_error");
  bool good = true;
  for (size_t i = 0; i < counts.size(); ++i) good &= out.counts.as<int64_t>()[i] == counts[i];
  expect(good, at + "counts");
  good = true;
  for (size_t i = 0; i < sums.size(); ++i) good &= near(out.sums.as<float>()[i], sums[i], sizes[i]);
  expect(good, at + "sums");
  good = true;
  for (int64_t i = 0; i < s.groups * s.slots; ++i) {
    const int64_t g = i / s.slots, r = i % s.slots;
    const float* vector = out.candidates.as<float>() + i * D;
    bool found = false;
    for (int64_t n = 0; n < s.rows && !found; ++n) {
      if (n % 4096 % s.slots != r) continue;
      found = true;
      for (int64_t d = 0; d < D; ++d) found &= x.get((n * s.groups + g) * D + d) == vector[d];
    }
    good &= out.candidate_scores.as<float>()[i] > 0 ? found : std::isnan(vector[0]) && std::isnan(vector[D - 1]);
  }
  expect(good, at + "candidates");
}

void decode(const Shape& s, const float* codebook, Encoding& encoding, DType dtype, bool at_end, int threads,
            const std::string& at) {
  const int64_t D = s.depth, K = s.codewords, bits = bits_of(K);
  Tensor x(s.rows * s.groups * D, dtype, at_end);
  Guarded flag(1, at_end), codes(static_cast<int64_t>(encoding.codes.bytes().size()), at_end);
  std::memcpy(codes.data(), encoding.codes.data(), encoding.codes.bytes().size());
  // The last code becomes the largest that its bits can hold.
  for (int64_t bit = (s.rows * s.groups - 1) * bits; bit < s.rows * s.groups * bits; ++bit)
    codes.as<uint8_t>()[bit / 8] |= static_cast<uint8_t>(1 << bit % 8);
  Guarded workspace(
      static_cast<int64_t>(lct::vq_decode_cpu_workspace(s.rows, s.groups, K, D, dtype)), at_end);
  lct::vq_decode_cpu({codes.as<uint8_t>(), codebook, x.memory.data(), flag.as<uint8_t>(), workspace.data(), s.rows,
                      s.groups, K, D, dtype},
                     threads);
  bool good = true;
  for (int64_t i = 0; i < s.rows * s.groups; ++i) {
    const int64_t code = std::min(code_at(codes.as<uint8_t>(), i, bits), K - 1);
    for (int64_t d = 0; d < D; ++d) {
      const float word = codebook[((i % s.groups) * K + code) * D + d];
      const double want = dtype == DType::f32 ? word : widen(narrow(word, dtype), dtype);
      good &= x.get(i * D + d) == want;
    }
  }
  expect(good, at + "decoded");
  expect(*flag.as<uint8_t>() == (K != int64_t{1} << bits ? 1 : 0), at + "the decoder's flag");
}

void update(const Shape& s, Guarded& codebook, Encoding& encoding, bool at_end, int threads, const std::string& at) {
  const int64_t D = s.depth, K = s.codewords, words = s.groups * K;
  Guarded book(words * D * 4, at_end), n(words * 4, at_end), m(words * D * 4, at_end);
  std::memcpy(book.data(), codebook.data(), static_cast<size_t>(words * D * 4));
  for (int64_t i = 0; i < words; ++i) n.as<float>()[i] = 1;
  std::memcpy(m.data(), codebook.data(), static_cast<size_t>(words * D * 4));
  const double decay = 0.75, eps = 1e-5, least = 1;
  lct::vq_update_cpu({book.as<float>(), n.as<float>(), m.as<float>(), encoding.counts.as<int64_t>(),
                      encoding.sums.as<float>(), encoding.candidates.as<float>(), s.groups, K, D, s.slots, decay,
                      eps, least},
                     threads);
  bool good = true;
  for (int64_t g = 0; g < s.groups; ++g) {
    double total = 0;
    const auto average = [&](int64_t k) { return decay + (1 - decay) * encoding.counts.as<int64_t>()[g * K + k]; };
    for (int64_t k = 0; k < K; ++k) total += average(k);
    int64_t next = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t i = g * K + k;
      while (next < s.slots && !(encoding.candidate_scores.as<float>()[g * s.slots + next] > 0)) ++next;
      const bool revived = average(k) < least && next < s.slots;
      const double count = revived ? std::fmax(total / K, least) : average(k);
      good &= near(n.as<float>()[i], count, count);
      for (int64_t d = 0; d < D; ++d) {
        const double taken = revived ? encoding.candidates.as<float>()[(g * s.slots + next) * D + d] : 0;
        const double a = decay * codebook.as<float>()[i * D + d], b = (1 - decay) * encoding.sums.as<float>()[i * D + d];
        const double sum = revived ? count * taken : a + b;
        const double divisor = (average(k) + eps) / (total + K * eps) * total;
        const double scale = revived ? std::fabs(sum) : std::fabs(a) + std::fabs(b);
        good &= near(m.as<float>()[i * D + d], sum, scale);
        good &= near(book.as<float>()[i * D + d], revived ? taken : sum / divisor, revived ? 0 : 4 * scale / divisor);
      }
      if (revived) ++next;
    }
  }
  expect(good, at + "update");
}

void run(const Shape& s, DType dtype, bool at_end, std::vector<char>& first, const std::string& level) {
  state = static_cast<uint64_t>(s.rows * 131 + s.codewords);
  Tensor x(s.rows * s.groups * s.depth, dtype, at_end);
  Guarded codebook(s.groups * s.codewords * s.depth * 4, at_end);
  for (int64_t i = 0; i < x.count; ++i) x.set(i, normal());
  for (int64_t i = 0; i < s.groups * s.codewords * s.depth; ++i) codebook.as<float>()[i] = static_cast<float>(normal());
  if (s.rows > 40) x.set_nan(37 * s.groups * s.depth);
  if (s.rows > 70) x.set(70 * s.groups * s.depth - 1, INFINITY);
  for (int threads : {1, 3}) {
    char name[160];
    std::snprintf(name, sizeof name, "%s %lldx%lldx%lldx%lld slots %lld dtype %d threads %d: ", level.c_str(),
                  static_cast<long long>(s.rows), static_cast<long long>(s.groups),
                  static_cast<long long>(s.codewords), static_cast<long long>(s.depth),
                  static_cast<long long>(s.slots), static_cast<int>(dtype), threads);
    Encoding out(s, at_end);
    Guarded workspace(static_cast<int64_t>(lct::vq_encode_cpu_workspace(s.rows, s.groups, s.codewords, s.depth,
                                                                        s.slots, dtype, threads)),
                      at_end);
    lct::vq_encode_cpu({x.memory.data(), codebook.as<float>(), out.codes.as<uint8_t>(), out.counts.as<int64_t>(),
                        out.sums.as<float>(), out.squared_error.as<float>(), out.candidates.as<float>(),
                        out.candidate_scores.as<float>(), out.flag.as<uint8_t>(), workspace.data(), s.rows, s.groups,
                        s.codewords, s.depth, s.slots, dtype},
                       threads);
    if (first.empty()) {
      first = out.bytes();
      check(s, x, codebook.as<float>(), out, name);
    } else {
      expect(out.bytes() == first, std::string(name) + "other bits than the first call");
    }
    decode(s, codebook.as<float>(), out, dtype, at_end, threads, name);
    update(s, codebook, out, at_end, threads, name);
  }
}

#ifdef LCT_X86
// The filter alone finds the words of ordinary rows, and says so where it does not.
void filter(const lct::VqFilter& filter, int64_t depth, float size, bool spoilt) {
  constexpr int64_t K = 100, rows = lct::kVqBlock;
  std::vector<float> codebook(static_cast<size_t>(K * depth)), x(static_cast<size_t>(rows * depth));
  std::vector<float> columns(x.size());
  for (float& each : codebook) each = size * static_cast<float>(normal());
  for (float& each : x) each = size * static_cast<float>(normal());
  if (spoilt) x[static_cast<size_t>(5 * depth)] = NAN;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t d = 0; d < depth; ++d)
      columns[static_cast<size_t>(d * rows + n)] = x[static_cast<size_t>(n * depth + d)];
  lct::VqWork work{};
  work.args.codebook = work.words = codebook.data();
  work.args.codewords = K;
  work.args.depth = work.width = depth;
  work.args.groups = 1;
  work.tiles = (K + lct::kVqTile - 1) / lct::kVqTile;
  std::vector<float> panels(static_cast<size_t>(work.tiles * lct::kVqPitch * depth));
  std::vector<float> half_norms(static_cast<size_t>(work.tiles * lct::kVqPitch));
  work.panels = panels.data();
  work.half_norms = half_norms.data();
  lct::avx512::vq_tasks.pack(work, 0, 0, K);
  std::vector<char> words(static_cast<size_t>(filter.group_bytes(work)));
  std::vector<char> scratch(static_cast<size_t>(filter.scratch_bytes(work)));
  work.filter_words = words.data();
  work.filter_scratch = scratch.data();
  filter.begin(work, 0);
  filter.prepare(work, 0);
  std::vector<int32_t> codes(static_cast<size_t>(rows));
  const bool found = filter.search(work, 0, columns.data(), x.data(), depth, codes.data(), 0);
  const bool ordinary = size == 1.0f && !spoilt;
  const std::string at = "filter, depth " + std::to_string(depth) + ", size " + std::to_string(size) + ": ";
  expect(found == ordinary, at + "found or did not find the words");
  for (int64_t n = 0; ordinary && n < rows; ++n) {
    double distances[K];
    for (int64_t k = 0; k < K; ++k) {
      distances[k] = 0;
      for (int64_t d = 0; d < depth; ++d) {
        const double word = codebook[static_cast<size_t>(k * depth + d)];
        distances[k] += std::pow(x[static_cast<size_t>(n * depth + d)] - word, 2);
      }
    }
    const double chosen = distances[codes[static_cast<size_t>(n)]];
    expect(chosen <= *std::min_element(distances, distances + K) + 1e-4, at + "a word that is not the nearest");
  }
}

void filters() {
  if (lct::best_simd_level() != lct::SimdLevel::avx512vnni) return;
  for (int64_t depth : {8, 36}) {
    const lct::VqFilter& bits = depth < 24 ? lct::avx512vnni::vq_filter_16_bits : lct::avx512vnni::vq_filter_8_bits;
    filter(bits, depth, 1.0f, false);
    filter(bits, depth, 1.0f, true);
    filter(bits, depth, 1e-15f, false);
    filter(bits, depth, 1e15f, false);
  }
}
#endif

}  // namespace

int main() {
#ifdef LCT_X86
  filters();
#endif
  const Shape shapes[] = {
      {1, 1, 2, 1, 1},       // the smallest
      {3, 3, 5, 7, 16},      // more slots than rows, codes across bytes
      {65, 2, 3, 2, 0},      // one row past a block, no slots
      {131, 1, 255, 4, 3},   // whole fours, two copies of sums
      {515, 5, 257, 8, 16},  // one run and three rows, nine bits
      {1100, 1, 30, 20, 7},  // a vector and a half wide
      {70, 2, 13, 130, 5},   // deep, not in whole fours
      {9, 1, 4096, 3, 2},    // more words than a task packs
      {4099, 1, 16, 4, 16},  // a chunk and three rows
      {323, 2, 50, 30, 3},   // the filter, with 8 bits; with 16 above
  };
  for (const Shape& shape : shapes)
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      std::vector<char> first;
      for (int level = 0; level <= static_cast<int>(lct::best_simd_level()); ++level) {
        lct::set_simd_level(static_cast<lct::SimdLevel>(level));
        run(shape, dtype, level % 2 == 0, first, lct::name_of(static_cast<lct::SimdLevel>(level)));
      }
    }
  if (failures) {
    std::printf("%d of %d comparisons failed\n", failures, checks);
    return 1;
  }
  std::printf("ok %d\n", checks);
  return 0;
}
