// Moves the keys and values of a sequence from one engine's paged cache into another's, by hq's payloads: encoded out of pages of
// 16 tokens, [page, heads, tokens, head_dim] (HND), decoded into pages of 128 tokens, [page, tokens, heads, head_dim] (NHD).
// Chunks are shared out among threads. A sending and a receiving engine would each have one half of this, and a network between.
//
//     convert [TOKENS] [THREADS]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <lynxproto.h>

namespace lynx {

struct Error : std::runtime_error {
    explicit Error(int what) : std::runtime_error(lynx_strerror(what)), code(what) {}
    int code; ///< LYNX_ERR_*
};

inline void check(int code) {
    if (code != LYNX_OK) {
        throw Error(code);
    }
}

/// What a thread needs: it may be used for one call at a time, of any tile.
class Workspace {
public:
    Workspace() : scratch_(lynx_hq_scratch_size()) {}
    void *scratch() { return scratch_.data(); }
    /// Memory of a plan, aligned for it.
    void *plan(std::uint64_t bytes) {
        plan_.resize(std::max<std::size_t>(plan_.size(), bytes / sizeof(std::uint64_t) + 1));
        return plan_.data();
    }

private:
    std::vector<unsigned char> scratch_;
    std::vector<std::uint64_t> plan_;
};

using Payload = std::vector<std::uint8_t>;

/// hq for tiles of one shape: encodes out of any view, decodes into any. Threads may share it.
class Hq {
public:
    explicit Hq(const lynx_hq_config &config, std::vector<std::uint8_t> widths = {})
        : widths_(std::move(widths)), config_(config), bounds_() {
        config_.widths = widths_.empty() ? nullptr : widths_.data();
        check(lynx_hq_measure(&config_, &bounds_));
    }
    Hq(const Hq &) = delete; // config_ points into widths_
    Hq &operator=(const Hq &) = delete;

    std::vector<Payload> encode(const lynx_view &view, Workspace &work) const {
        const int count = config_.levels;
        std::vector<Payload> payloads(static_cast<std::size_t>(count));
        std::uint8_t *at[3] = {nullptr, nullptr, nullptr};
        for (int i = 0; i < count; i++) {
            payloads[static_cast<std::size_t>(i)].resize(bounds_.level[i]);
            at[i] = payloads[static_cast<std::size_t>(i)].data();
        }
        void *plan = work.plan(bounds_.plan);
        std::uint64_t sizes[3] = {0, 0, 0};
        const int outcome = lynx_hq_encode_tile(&config_, &view, at, sizes, plan, work.scratch());
        for (int i = 0; i < count; i++) {
            Payload &payload = payloads[static_cast<std::size_t>(i)];
            if (outcome == LYNX_STORED) { // coded it would be larger
                const std::uint64_t words = std::uint64_t{config_.heads} * config_.tokens * config_.head_dim;
                payload.resize(8 + (i == 0 ? 2 * words : 0));
                check(lynx_hq_store(&config_, &view, i, payload.data(), &sizes[i]));
            }
            payload.resize(sizes[i]);
        }
        if (outcome != LYNX_STORED) {
            check(outcome);
        }
        return payloads;
    }

    /// The words as good as the first `levels` payloads make them.
    void decode(const std::vector<Payload> &payloads, int levels, const lynx_view &view, Workspace &work) const {
        const std::uint8_t *at[3] = {nullptr, nullptr, nullptr};
        std::uint64_t sizes[3] = {0, 0, 0};
        for (int i = 0; i < levels; i++) {
            at[i] = payloads[static_cast<std::size_t>(i)].data();
            sizes[i] = payloads[static_cast<std::size_t>(i)].size();
        }
        void *plan = work.plan(bounds_.plan);
        lynx_hq_fault fault;
        const int outcome = lynx_hq_decode_tile(&config_, at, sizes, levels, &view, plan, work.scratch(), &fault);
        if (outcome == LYNX_STORED) {
            check(lynx_view_scatter(&view, 2, config_.heads, config_.tokens, config_.head_dim, at[0] + 8));
            return;
        }
        check(outcome);
    }

private:
    std::vector<std::uint8_t> widths_;
    lynx_hq_config config_;
    lynx_hq_bounds bounds_;
};

} // namespace lynx

namespace {

constexpr std::uint32_t HEADS = 4, HEAD_DIM = 128, CHUNK = 512; // tokens of a chunk

/// A paged cache of bfloat16 keys or values of one layer, and the sequence's block table.
struct PagedCache {
    std::uint32_t page_tokens;
    bool heads_first;
    std::vector<std::uint16_t> words;
    std::vector<std::int64_t> table;

    PagedCache(std::uint32_t tokens, std::uint32_t page_tokens_, bool heads_first_, unsigned seed)
        : page_tokens(page_tokens_), heads_first(heads_first_) {
        const std::size_t pages = (tokens + page_tokens - 1) / page_tokens;
        words.resize(pages * page_tokens * HEADS * HEAD_DIM);
        table.resize(pages);
        std::iota(table.begin(), table.end(), 0);
        std::shuffle(table.begin(), table.end(), std::mt19937(seed));
    }

    /// All heads of the tokens from `first` on.
    lynx_view view(std::uint32_t first) {
        lynx_view v{};
        const std::ptrdiff_t page = page_tokens;
        v.words = words.data();
        v.head_stride = heads_first ? page * HEAD_DIM : HEAD_DIM;
        v.token_stride = heads_first ? HEAD_DIM : std::ptrdiff_t{HEADS} * HEAD_DIM;
        v.pages = table.data() + first / page_tokens;
        v.page_stride = page * HEADS * HEAD_DIM;
        v.page_tokens = page_tokens;
        v.first_token = first % page_tokens;
        return v;
    }

    std::uint16_t &at(std::uint32_t head, std::uint32_t token, std::uint32_t channel) {
        const std::size_t page = static_cast<std::size_t>(table[token / page_tokens]), inside = token % page_tokens;
        const std::size_t row = heads_first ? (page * HEADS + head) * page_tokens + inside : (page * page_tokens + inside) * HEADS + head;
        return words[row * HEAD_DIM + channel];
    }
};

/// Calls work(chunk, workspace) for each of `count` chunks, on so many threads; the first exception is thrown on.
template <class Work> void in_parallel(std::size_t count, unsigned threads, const Work &work) {
    std::atomic<std::size_t> next{0};
    std::vector<std::exception_ptr> failures(threads);
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < threads; i++) {
        pool.emplace_back([&, i] {
            try {
                lynx::Workspace workspace;
                for (std::size_t chunk = next++; chunk < count; chunk = next++) {
                    work(chunk, workspace);
                }
            } catch (...) {
                failures[i] = std::current_exception();
            }
        });
    }
    for (std::thread &thread : pool) {
        thread.join();
    }
    for (const std::exception_ptr &failure : failures) {
        if (failure) {
            std::rethrow_exception(failure);
        }
    }
}

lynx_hq_config config_of(int part, std::uint32_t tokens) { // the preset "fast": spec/codec-hq.md, "Configuration"
    lynx_hq_config config{};
    config.dtype = LYNX_BFLOAT16;
    config.part = part;
    config.heads = HEADS;
    config.tokens = tokens;
    config.head_dim = HEAD_DIM;
    config.levels = 3;
    config.scaling = 1;
    config.range_bits = static_cast<std::uint64_t>(3.15 * HEADS * HEAD_DIM);
    return config;
}

double seconds_since(std::chrono::steady_clock::time_point began) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

int run(std::uint32_t tokens, unsigned threads) {
    const std::size_t per_part = (tokens + CHUNK - 1) / CHUNK, chunks = 2 * per_part;
    std::vector<PagedCache> from, to;
    for (unsigned part = 0; part < 2; part++) { // keys, values
        from.emplace_back(tokens, 16u, true, 1 + part);
        to.emplace_back(tokens, 128u, false, 3 + part);
        std::mt19937 random(5 + part);
        std::normal_distribution<float> normal;
        for (std::uint16_t &word : from.back().words) {
            const float value = normal(random);
            std::uint32_t bits;
            std::copy_n(reinterpret_cast<const char *>(&value), sizeof bits, reinterpret_cast<char *>(&bits));
            word = static_cast<std::uint16_t>(bits >> 16);
        }
    }
    const auto size_of = [&](std::size_t chunk) { // the last chunk of a part may be short
        return std::min(CHUNK, tokens - static_cast<std::uint32_t>(chunk % per_part) * CHUNK);
    };
    const auto codec_of = [&](std::size_t chunk) {
        const int part = chunk < per_part ? LYNX_KEY : LYNX_VALUE;
        std::vector<std::uint8_t> widths; // of keys: by their ranges
        if (part == LYNX_VALUE) {
            widths.assign(std::size_t{HEADS} * HEAD_DIM, 3);
        }
        return std::make_unique<lynx::Hq>(config_of(part, size_of(chunk)), std::move(widths));
    };
    std::vector<std::vector<lynx::Payload>> payloads(chunks);
    const auto first_of = [&](std::size_t chunk) { return static_cast<std::uint32_t>(chunk % per_part) * CHUNK; };

    auto began = std::chrono::steady_clock::now();
    in_parallel(chunks, threads, [&](std::size_t chunk, lynx::Workspace &work) {
        payloads[chunk] = codec_of(chunk)->encode(from[chunk / per_part].view(first_of(chunk)), work);
    });
    const double encoding = seconds_since(began);

    const double total = 2.0 * 2.0 * tokens * HEADS * HEAD_DIM;
    std::uint64_t anchor_bytes = 0, all_bytes = 0;
    for (const auto &levels : payloads) {
        anchor_bytes += levels[0].size();
        for (const auto &payload : levels) {
            all_bytes += payload.size();
        }
    }
    std::printf("%u tokens, %zu chunks, %u threads; anchors %.3f, all levels %.3f of bfloat16; encoded at %.2f GB/s\n", tokens,
                chunks, threads, static_cast<double>(anchor_bytes) / total, static_cast<double>(all_bytes) / total,
                total / encoding / 1e9);
    for (int levels = 1; levels <= 3; levels++) {
        began = std::chrono::steady_clock::now();
        in_parallel(chunks, threads, [&](std::size_t chunk, lynx::Workspace &work) {
            codec_of(chunk)->decode(payloads[chunk], levels, to[chunk / per_part].view(first_of(chunk)), work);
        });
        std::printf("%d level%s decoded at %.2f GB/s\n", levels, levels > 1 ? "s" : "", total / seconds_since(began) / 1e9);
    }
    std::size_t wrong = 0;
    for (std::size_t part = 0; part < 2; part++) {
        for (std::uint32_t head = 0; head < HEADS; head++) {
            for (std::uint32_t token = 0; token < tokens; token++) {
                for (std::uint32_t channel = 0; channel < HEAD_DIM; channel++) {
                    wrong += from[part].at(head, token, channel) != to[part].at(head, token, channel);
                }
            }
        }
    }
    std::printf("%zu words differ\n", wrong);
    return wrong == 0 ? 0 : 1;
}

} // namespace

int main(int argc, char **argv) {
    const unsigned long tokens = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 4000;
    const unsigned long threads = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : std::max(1u, std::thread::hardware_concurrency());
    if (argc > 3 || tokens == 0 || tokens > 10'000'000 || threads == 0 || threads > 1024) {
        std::fputs("usage: convert [TOKENS] [THREADS]\n", stderr);
        return 2;
    }
    try {
        return run(static_cast<std::uint32_t>(tokens), static_cast<unsigned>(threads));
    } catch (const std::exception &error) {
        std::fprintf(stderr, "convert: %s\n", error.what());
        return 1;
    }
}
