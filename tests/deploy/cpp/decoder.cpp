// Calls the TensorRT back end's cache as it is told, and prints the logits of each call, or why it was refused.
//
//     decoder MODEL BATCH MOST < CALLS       a call: "TOKENS TOTAL", ids and positions [batch, tokens], mask [batch,
//                                            total]; "0 0" begins another request, which a refusal ends
#include <iostream>
#include <limits>

#include "runner/backend.h"

namespace {

teamlora::Tokens read_row(std::size_t size) {
    teamlora::Tokens values(size);
    for (std::int64_t& value : values) std::cin >> value;
    return values;
}

}  // namespace

int main(int, char** words) {
    const teamlora::Folder folder = teamlora::open_folder(words[1], true);
    const auto backend = teamlora::open_tensorrt(folder, {});
    const std::size_t batch = std::stoul(words[2]), most = std::stoul(words[3]);
    auto decoder = backend->start(batch, most);
    std::cout.precision(std::numeric_limits<float>::max_digits10);
    for (std::size_t tokens = 0, total = 0; std::cin >> tokens >> total;) {
        if (tokens == 0) {
            decoder.reset();
            decoder = backend->start(batch, most);
            continue;
        }
        const teamlora::Tokens ids = read_row(batch * tokens), positions = read_row(batch * tokens);
        const teamlora::Tokens mask = read_row(batch * total);
        if (decoder == nullptr) continue;
        try {
            for (const float value : decoder->run(ids, mask, positions)) std::cout << value << ' ';
            std::cout << std::endl;
        } catch (const teamlora::Error& error) {
            std::cout << error.what() << '\n';
            decoder.reset();
        }
    }
}
