// Requests of a model with a shelf of adapters, as the standard input says, a command a line:
//
//     tenants MODEL TOKENS [PATIENCE]     seconds, see `Options`
//     names                what is on the shelf
//     ask NAME IDS         begins a request on a thread of its own, which waits behind its first token
//     queue NAME IDS       the same, and nobody waits for that token
//     step                 lets all of them go on by a token
//     go                   lets all of them go on, and prints their answers in the order in which they were asked
//     request NAME IDS     is one of those that `race` is run with
//     race ROUNDS          each of them alone, then all of them so often on eight threads: how many answers differ
//
// `-` in place of NAME is the base alone. What is refused is printed.
#include <atomic>
#include <condition_variable>
#include <future>
#include <iostream>
#include <mutex>
#include <sstream>
#include <thread>

#include "runner/runner.h"

namespace {

using teamlora::Tokens;

constexpr std::size_t kThreads = 8;

struct Request {
    teamlora::AdapterNames adapter;
    Tokens ids;
};

Request read_request(std::istringstream& words) {
    std::string name;
    words >> name;
    Request request{{name == "-" ? std::nullopt : std::make_optional(name)}, {}};
    for (std::int64_t id = 0; words >> id;) request.ids.push_back(id);
    return request;
}

std::string joined(const Tokens& tokens) {
    std::string text;
    for (const std::int64_t token : tokens) text += (text.empty() ? "" : " ") + std::to_string(token);
    return text;
}

// Requests that are in the middle of their answers.
class Waiting {
public:
    Waiting(const teamlora::Runner& runner, std::size_t count) : runner_(runner), count_(count) {}
    ~Waiting() { go(); }

    // What is said when its first token is there, or why it was refused.
    std::future<std::string> ask(const Request& request) {
        std::promise<std::string> begun;
        std::future<std::string> said = begun.get_future();
        answers_.push_back(std::async(std::launch::async, [this, request, begun = std::move(begun)]() mutable {
            std::size_t tokens = 0;
            try {
                const auto on_token = [&](std::size_t, std::int64_t) {
                    if (tokens++ == 0) begun.set_value("begun");
                    std::unique_lock<std::mutex> lock(mutex_);
                    going_.wait(lock, [&] { return go_ || tokens <= steps_; });
                    return true;
                };
                const Tokens answer = runner_.generate({request.ids}, count_, on_token, request.adapter)[0];
                if (tokens == 0) begun.set_value("begun");
                return joined(answer);
            } catch (const teamlora::Error& error) {
                if (tokens == 0) begun.set_value(error.what());
                return std::string("refused");
            }
        }));
        return said;
    }

    void step() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ++steps_;
        }
        going_.notify_all();
    }

    void go() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            go_ = true;
        }
        going_.notify_all();
        for (auto& answer : answers_) std::cout << answer.get() << std::endl;
        answers_.clear();
        go_ = false;
        steps_ = 0;
    }

private:
    const teamlora::Runner& runner_;
    std::size_t count_;
    std::mutex mutex_;
    std::condition_variable going_;
    bool go_ = false;
    // Tokens behind which none of them waits.
    std::size_t steps_ = 0;
    std::vector<std::future<std::string>> answers_;
};

std::size_t race(const teamlora::Runner& runner, const std::vector<Request>& requests, std::size_t count,
                 std::size_t rounds) {
    std::vector<std::vector<Tokens>> alone;
    for (const Request& request : requests) {
        alone.push_back(runner.generate({request.ids}, count, {}, request.adapter));
    }
    std::atomic<std::size_t> next{0}, different{0};
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < kThreads; ++i) {
        threads.emplace_back([&] {
            for (std::size_t mine = next++; mine < rounds * requests.size(); mine = next++) {
                const std::size_t which = mine % requests.size();
                try {
                    const Request& request = requests[which];
                    different += runner.generate({request.ids}, count, {}, request.adapter) != alone[which] ? 1 : 0;
                } catch (const teamlora::Error& error) {
                    std::cerr << error.what() << '\n';
                    ++different;
                }
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    return different;
}

}  // namespace

int main(int given, char** words) {
    teamlora::Options options;
    options.threads = 1;
    options.streams = kThreads;
    if (given > 3) options.patience = std::stoi(words[3]);
    const teamlora::Runner runner(words[1], options);
    const std::size_t count = std::stoul(words[2]);
    Waiting waiting(runner, count);
    std::vector<Request> requests;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream rest(line);
        std::string command;
        rest >> command;
        if (command == "names") {
            for (const std::string& name : runner.adapters()) std::cout << name << ' ';
            std::cout << std::endl;
        } else if (command == "ask") {
            std::cout << waiting.ask(read_request(rest)).get() << std::endl;
        } else if (command == "queue") {
            waiting.ask(read_request(rest));
        } else if (command == "step") {
            waiting.step();
        } else if (command == "go") {
            waiting.go();
        } else if (command == "request") {
            requests.push_back(read_request(rest));
        } else if (command == "race") {
            std::size_t rounds = 0;
            rest >> rounds;
            std::cout << "different " << race(runner, requests, count, rounds) << std::endl;
        }
    }
}
