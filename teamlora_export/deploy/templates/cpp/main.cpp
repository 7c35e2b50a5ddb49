// Reads prompts and prints what the model says.
//
//     runner [options] "a prompt" ["another, in the same batch" ...]
//     echo "504 3575 282" | runner --ids            a line of token ids is a prompt, and so is a line of the answer
//
// Options: --model DIR (default: model), --tokens N (64), --backend onnxruntime|tensorrt, --engine NAME,
// --library FILE (with the op, for ONNX Runtime), --threads N, --no-check (leaves out the comparison of hashes),
// --adapter NAME (of a model with several: the one to answer with; again for each prompt's own, - for none).
// Without prompts, the standard input is one. Exit codes: 0 done, 2 wrong input or environment.
#include <charconv>
#include <chrono>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "runner/runner.h"
#include "runner/tokenizer.h"

namespace {

using teamlora::Error;
using teamlora::Tokens;

// In place of an adapter's name, which begins with a letter or a digit.
constexpr const char* kBaseAlone = "-";

struct Arguments {
    std::filesystem::path model = "model";
    std::size_t count = 64;
    bool ids = false;
    std::vector<std::string> prompts;
    teamlora::AdapterNames adapters;
    teamlora::Options options;

    // One that is named once is that of all prompts.
    teamlora::AdapterNames adapters_of(std::size_t rows) const {
        return adapters.size() == 1 ? teamlora::AdapterNames(rows, adapters[0]) : adapters;
    }
};

int number(const std::string& option, const std::string& text) {
    std::size_t used = 0;
    int value = -1;
    try {
        value = std::stoi(text, &used);
    } catch (const std::exception&) {
        used = 0;
    }
    if (used == 0 || used != text.size() || value < 0) throw Error(option + " " + text + ": give a number.");
    return value;
}

Arguments parse(const std::vector<std::string>& words) {
    Arguments arguments;
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        const auto value = [&]() -> const std::string& {
            if (i + 1 == words.size()) throw Error(word + ": its value is missing.");
            return words[++i];
        };
        if (word == "--model") {
            arguments.model = value();
        } else if (word == "--tokens") {
            arguments.count = static_cast<std::size_t>(number(word, value()));
        } else if (word == "--ids") {
            arguments.ids = true;
        } else if (word == "--backend") {
            arguments.options.backend = value();
        } else if (word == "--engine") {
            arguments.options.engine = value();
        } else if (word == "--library") {
            arguments.options.op_library = value();
        } else if (word == "--threads") {
            arguments.options.threads = number(word, value());
        } else if (word == "--adapter") {
            const std::string& name = value();
            arguments.adapters.push_back(name == kBaseAlone ? std::nullopt : std::make_optional(name));
        } else if (word == "--no-check") {
            arguments.options.check_files = false;
        } else if (word.rfind("--", 0) == 0) {
            throw Error(word + ": there is no such option. main.cpp lists them.");
        } else {
            arguments.prompts.push_back(word);
        }
    }
    if (arguments.ids && !arguments.prompts.empty())
        throw Error("Token ids are read from the standard input: no prompts with --ids.");
    return arguments;
}

std::vector<Tokens> read_ids(std::istream& input) {
    std::vector<Tokens> prompts;
    for (std::string line; std::getline(input, line);) {
        std::istringstream words(line);
        Tokens ids;
        for (std::string word; words >> word;) {
            const char* end = word.data() + word.size();
            const auto read = std::from_chars(word.data(), end, ids.emplace_back());
            if (read.ec != std::errc() || read.ptr != end) {
                throw Error("Not a line of token ids: " + line.substr(0, 80));
            }
        }
        if (!ids.empty()) prompts.push_back(ids);
    }
    return prompts;
}

// `text` with its control characters escaped, but for those in `keep`: a terminal would obey them.
std::string printable(const std::string& text, const std::string& keep = "\n\t") {
    const char* digits = "0123456789abcdef";
    std::string shown;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto byte = static_cast<unsigned char>(text[i]);
        // The second range of control characters has two bytes in UTF-8.
        const bool second = byte == 0xc2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xa0;
        if (!second && (byte >= 0x20 || keep.find(text[i]) != std::string::npos) && byte != 0x7f) {
            shown += text[i];
            continue;
        }
        const auto control = second ? static_cast<unsigned char>(text[++i]) : byte;
        shown += {'\\', 'x', digits[control >> 4], digits[control & 15]};
    }
    return shown;
}

template <typename T>
void print_line(const std::vector<T>& values) {
    for (std::size_t i = 0; i < values.size(); ++i) std::cout << (i == 0 ? "" : " ") << values[i];
    std::cout << '\n';
}

void tell_speed(const std::vector<Tokens>& answers, std::chrono::steady_clock::time_point started) {
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
    std::size_t count = 0;
    for (const Tokens& answer : answers) count += answer.size();
    std::cerr << "(" << count << " tokens, " << static_cast<double>(count) / seconds.count() << " a second)\n";
}

// One prompt is streamed; several are a batch.
void generate_text(const teamlora::Runner& runner, const teamlora::Tokenizer& tokenizer, const Arguments& arguments) {
    std::vector<Tokens> ids;
    for (const std::string& prompt : arguments.prompts) ids.push_back(tokenizer.encode(prompt));
    const auto started = std::chrono::steady_clock::now();
    const teamlora::AdapterNames adapters = arguments.adapters_of(ids.size());
    std::vector<Tokens> answers;
    if (ids.size() == 1) {
        teamlora::TextStream stream(tokenizer);
        std::cout << printable(arguments.prompts[0]) << std::flush;
        answers = runner.generate(
            ids, arguments.count,
            [&](std::size_t, std::int64_t token) {
                std::cout << printable(stream.add(token)) << std::flush;
                return true;
            },
            adapters);
        std::cout << '\n';
    } else {
        answers = runner.generate(ids, arguments.count, {}, adapters);
        for (std::size_t row = 0; row < ids.size(); ++row) {
            std::cout << printable(arguments.prompts[row] + tokenizer.decode(answers[row])) << '\n';
        }
    }
    tell_speed(answers, started);
}

void run(Arguments arguments) {
    const teamlora::Runner runner(arguments.model, arguments.options);
    std::cerr << runner.description() << '\n';
    std::cout.precision(9);
    if (arguments.ids) {
        const std::vector<Tokens> prompts = read_ids(std::cin);
        const teamlora::AdapterNames adapters = arguments.adapters_of(prompts.size());
        if (runner.generates()) {
            for (const Tokens& answer : runner.generate(prompts, arguments.count, {}, adapters)) print_line(answer);
        } else {
            for (const auto& row : runner.encode(prompts, adapters)) print_line(row);
        }
        return;
    }
    const teamlora::Tokenizer tokenizer(arguments.model);
    if (arguments.prompts.empty()) {
        arguments.prompts.emplace_back(std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>());
    }
    if (runner.generates()) {
        generate_text(runner, tokenizer, arguments);
    } else {
        std::vector<Tokens> ids;
        for (const std::string& text : arguments.prompts) ids.push_back(tokenizer.encode(text));
        for (const auto& row : runner.encode(ids, arguments.adapters_of(ids.size()))) print_line(row);
    }
}

}  // namespace

int main(int count, char** words) {
    try {
        run(parse({words + 1, words + count}));
        if (!std::cout.flush()) throw Error("The output cannot be written.");
        return 0;
    } catch (const std::bad_alloc&) {
        std::cerr << "Error: Not enough memory for this model on this machine.\n";
        return 2;
    } catch (const std::exception& error) {
        std::cerr << "Error: " << printable(error.what(), "") << '\n';
        return 2;
    }
}
