// Many requests of random lengths, one by one and then on eight threads: the answers must be the same, and memory must
// not grow with their number. Prints a digest of generated tokens, which two back ends can be compared by.
//
//     requests MODEL COUNT [TOKEN]      a prompt of TOKENs alone goes before each, which must leave nothing behind
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <iostream>
#include <random>
#include <thread>

#include "runner/runner.h"

namespace {

using teamlora::Tokens;

constexpr std::size_t kThreads = 8;
constexpr std::size_t kTokens = 4;

std::vector<std::vector<Tokens>> draw(std::size_t count) {
    std::mt19937 random(3);
    const auto between = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    std::vector<std::vector<Tokens>> requests(count);
    for (std::size_t i = 0; i < count; ++i) {
        requests[i].resize(i < 2 ? 1 + 2 * i : static_cast<std::size_t>(between(1, 3)));
        for (Tokens& prompt : requests[i]) {
            // A long prompt, then a batch of short ones: memory that is large enough must not hide that its shape
            // changed.
            prompt.resize(i < 2 ? 40 - 38 * i : static_cast<std::size_t>(between(1, 40)));
            std::generate(prompt.begin(), prompt.end(), [&] { return between(1, 382); });
        }
    }
    return requests;
}

double resident_megabytes() {
    long size = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> size >> resident;
    return static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e6;
}

void print_digest(const std::vector<std::vector<Tokens>>& answers) {
    std::uint64_t digest = 0;
    for (const auto& rows : answers) {
        for (const Tokens& row : rows) {
            for (const std::int64_t token : row) digest = (digest ^ static_cast<std::uint64_t>(token)) * 1099511628211u;
        }
    }
    std::cout << "digest " << digest << '\n';
}

void print_digest(const std::vector<std::vector<std::vector<float>>>&) {}

template <typename Answer, typename Ask>
std::size_t compare(const std::vector<std::vector<Tokens>>& requests, Ask ask) {
    std::vector<Answer> alone(requests.size()), together(requests.size());
    double early = 0;
    for (std::size_t i = 0; i < requests.size(); ++i) {
        alone[i] = ask(requests[i]);
        if (i == requests.size() / 4) early = resident_megabytes();
    }
    print_digest(alone);
    std::cout << "growth " << resident_megabytes() - early << '\n';
    std::atomic<std::size_t> next{0};
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < kThreads; ++i) {
        threads.emplace_back([&] {
            for (std::size_t mine = next++; mine < requests.size(); mine = next++) together[mine] = ask(requests[mine]);
        });
    }
    for (std::thread& thread : threads) thread.join();
    std::size_t different = 0;
    for (std::size_t i = 0; i < requests.size(); ++i) different += alone[i] != together[i] ? 1 : 0;
    return different;
}

}  // namespace

int main(int count, char** words) {
    teamlora::Options options;
    options.threads = 1;
    const teamlora::Runner runner(words[1], options);
    const auto requests = draw(std::stoul(words[2]));
    const Tokens before(count > 3 ? 60 : 0, count > 3 ? std::stol(words[3]) : 0);
    const auto generate = [&](const auto& prompts) {
        try {
            if (!before.empty()) runner.generate({before, before, before}, kTokens);
        } catch (const teamlora::Error&) {
            // It is the one that is no number; what it has left is there all the same.
        }
        return runner.generate(prompts, kTokens);
    };
    const std::size_t different = runner.generates()
                                      ? compare<std::vector<Tokens>>(requests, generate)
                                      : compare<std::vector<std::vector<float>>>(
                                            requests, [&](const auto& inputs) { return runner.encode(inputs); });
    std::cout << "different " << different << '\n';
    return different == 0 ? 0 : 1;
}
