#include "runner.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "backend.h"
#include "folder.h"

namespace teamlora {
namespace {

bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

std::unique_ptr<Backend> open_backend(const Folder& folder, const Options& options) {
    std::string wanted = options.backend;
#ifdef TEAMLORA_TENSORRT
    if (wanted.empty() && !folder.engines.empty()) wanted = "tensorrt";
    if (wanted == "tensorrt") return open_tensorrt(folder, options);
#endif
#ifdef TEAMLORA_ONNXRUNTIME
    if (wanted.empty() || wanted == "onnxruntime") return open_onnxruntime(folder, options);
#endif
    throw Error(wanted.empty()
                    ? folder.path.string() + ": holds no engine, and this program was built for TensorRT alone."
                    : "This program was built without the back end " + wanted + ".");
}

// Padding on the left, so that the last column is the last token of every row.
Tokens pad(const std::vector<Tokens>& rows, std::size_t width, std::int64_t padding, bool left) {
    Tokens padded(rows.size() * width, padding);
    for (std::size_t row = 0; row < rows.size(); ++row) {
        const auto start =
            padded.begin() + static_cast<std::ptrdiff_t>(row * width + (left ? width - rows[row].size() : 0));
        std::copy(rows[row].begin(), rows[row].end(), start);
    }
    return padded;
}

std::vector<Tokens> ones_like(const std::vector<Tokens>& rows) {
    std::vector<Tokens> ones;
    for (const Tokens& row : rows) ones.emplace_back(row.size(), 1);
    return ones;
}

std::size_t longest(const std::vector<Tokens>& rows) {
    std::size_t most = 0;
    for (const Tokens& row : rows) most = std::max(most, row.size());
    return most;
}

// A real token's position is the number of real ones before it.
Tokens positions_of(const Tokens& mask, std::size_t batch) {
    Tokens positions(mask.size(), 1);
    const std::size_t width = mask.size() / batch;
    for (std::size_t row = 0; row < batch; ++row) {
        std::int64_t next = 0;
        for (std::size_t column = row * width; column < (row + 1) * width; ++column) {
            if (mask[column] != 0) positions[column] = next++;
        }
    }
    return positions;
}

// Columns `from` to `to` of values [batch, width].
Tokens columns(const Tokens& values, std::size_t batch, std::size_t from, std::size_t to) {
    const std::size_t width = values.size() / batch;
    Tokens cut;
    cut.reserve(batch * (to - from));
    for (auto row = values.begin(); row != values.end(); row += static_cast<std::ptrdiff_t>(width)) {
        cut.insert(cut.end(), row + static_cast<std::ptrdiff_t>(from), row + static_cast<std::ptrdiff_t>(to));
    }
    return cut;
}

// Runs ids and positions [batch, tokens], mask [batch, tokens so far], in parts where they are many.
const std::vector<float>& read(Decoder& decoder, const Tokens& ids, const Tokens& mask, const Tokens& positions,
                               std::size_t batch) {
    const std::size_t tokens = ids.size() / batch, before = (mask.size() - ids.size()) / batch;
    std::size_t start = 0;
    for (; tokens - start > decoder.part(); start += decoder.part()) {
        const std::size_t end = start + decoder.part();
        decoder.run(columns(ids, batch, start, end), columns(mask, batch, 0, before + end),
                    columns(positions, batch, start, end));
    }
    if (start == 0) return decoder.run(ids, mask, positions);
    return decoder.run(columns(ids, batch, start, tokens), mask, columns(positions, batch, start, tokens));
}

// mask [batch, width] with a column of ones more.
Tokens with_one_more(const Tokens& mask, std::size_t batch) {
    const std::size_t width = mask.size() / batch;
    Tokens longer;
    longer.reserve(mask.size() + batch);
    for (std::size_t row = 0; row < batch; ++row) {
        const auto start = mask.begin() + static_cast<std::ptrdiff_t>(row * width);
        longer.insert(longer.end(), start, start + static_cast<std::ptrdiff_t>(width));
        longer.push_back(1);
    }
    return longer;
}

// What is no number compares with nothing, so that the largest of such values means nothing.
void require_numbers(std::vector<float>::const_iterator start, std::vector<float>::const_iterator end) {
    if (std::any_of(start, end, [](float value) { return std::isnan(value); })) {
        throw Error("The model's answer to this is no number (NaN).");
    }
}

using Rows = std::vector<std::size_t>;

std::size_t slot_count(const Backend& backend) {
    return backend.adapters() == nullptr ? 0 : backend.adapters()->slots();
}

// The rows of each batch: at most so many, with no more adapters than there are slots.
std::vector<Rows> batches(const std::vector<Found>& adapters, std::size_t most, std::size_t slots) {
    std::vector<Rows> made;
    std::set<std::string> theirs;
    for (std::size_t row = 0; row < adapters.size(); ++row) {
        const bool known = adapters[row] == nullptr || theirs.count(adapters[row]->key()) != 0;
        if (made.empty() || made.back().size() == most || (!known && theirs.size() == slots)) {
            made.emplace_back();
            theirs.clear();
        }
        if (adapters[row] != nullptr) theirs.insert(adapters[row]->key());
        made.back().push_back(row);
    }
    return made;
}

template <typename T>
std::vector<T> picked(const std::vector<T>& values, const Rows& rows) {
    std::vector<T> some;
    for (const std::size_t row : rows) some.push_back(values[row]);
    return some;
}

// The slots of rows with these adapters, for as long as it is there.
class HeldRows {
public:
    HeldRows(const Backend& backend, const std::vector<Found>& adapters) {
        if (backend.adapters() != nullptr) held_.emplace(backend.adapters()->take(adapters));
    }
    Slots slots() const { return held_ ? held_->rows() : Slots(); }

private:
    std::optional<Adapters::Held> held_;
};

}  // namespace

Runner::Runner(const std::filesystem::path& folder, const Options& options)
    : folder_(std::make_unique<Folder>(open_folder(folder, options.check_files))),
      backend_(open_backend(*folder_, options)) {
    if (folder_->shelf && backend_->adapters() == nullptr) {
        throw Error(folder_->path.string() + ": has a shelf of adapters, which " + backend_->description() +
                    " does not take here.");
    }
}

Runner::~Runner() = default;
Runner::Runner(Runner&&) noexcept = default;
Runner& Runner::operator=(Runner&&) noexcept = default;

bool Runner::generates() const { return folder_->task == "text-generation"; }

std::string Runner::description() const { return backend_->description(); }

std::vector<Tokens> Runner::generate(const std::vector<Tokens>& prompts, std::size_t count, const OnToken& on_token,
                                     const AdapterNames& adapters) const {
    if (!generates()) throw Error(folder_->path.string() + ": does not generate text.");
    check(prompts);
    const std::vector<Found> found = find(adapters, prompts.size());
    const std::size_t width = longest(prompts);
    count = room(width, count);
    const auto differs = [width](const Tokens& prompt) { return prompt.size() != width; };
    const bool apart = !folder_->takes_padding && std::any_of(prompts.begin(), prompts.end(), differs);
    std::vector<Tokens> answers(prompts.size());
    for (const Rows& rows : batches(found, apart ? 1 : prompts.size(), slot_count(*backend_))) {
        OnToken of_rows;
        if (on_token) of_rows = [&](std::size_t row, std::int64_t token) { return on_token(rows[row], token); };
        const HeldRows held(*backend_, picked(found, rows));
        std::vector<Tokens> theirs = generate_batch(picked(prompts, rows), count, of_rows, held.slots());
        for (std::size_t i = 0; i < rows.size(); ++i) answers[rows[i]] = std::move(theirs[i]);
    }
    return answers;
}

std::vector<Tokens> Runner::generate_batch(const std::vector<Tokens>& prompts, std::size_t count,
                                           const OnToken& on_token, const Slots& slots) const {
    const std::size_t batch = prompts.size(), width = longest(prompts);
    count = room(width, count);
    Tokens ids = pad(prompts, width, folder_->padding, true);
    Tokens mask = pad(ones_like(prompts), width, 0, true);
    Tokens positions = positions_of(mask, batch);
    std::vector<Tokens> answers(batch);
    std::vector<bool> going(batch, true);
    const std::unique_ptr<Decoder> decoder = backend_->start(batch, width + count, slots);
    // Also of a request that holds no slot: what holds one may wait for its place.
    Adapters* const adapters = backend_->adapters();
    for (std::size_t step = 0; step < count; ++step) {
        const std::vector<float>& logits = read(*decoder, ids, mask, positions, batch);
        if (adapters != nullptr) adapters->went_on();
        const std::size_t vocabulary = logits.size() / batch;
        ids.resize(batch);
        for (std::size_t row = 0; row < batch; ++row) {
            const auto start = logits.begin() + static_cast<std::ptrdiff_t>(row * vocabulary);
            const auto end = start + static_cast<std::ptrdiff_t>(vocabulary);
            if (going[row]) require_numbers(start, end);
            ids[row] = std::max_element(start, end) - start;
            const auto& stops = folder_->stop_tokens;
            if (going[row] && std::find(stops.begin(), stops.end(), ids[row]) != stops.end()) going[row] = false;
            if (!going[row]) continue;
            answers[row].push_back(ids[row]);
            if (on_token && !on_token(row, ids[row])) going[row] = false;
        }
        if (std::find(going.begin(), going.end(), true) == going.end()) break;
        mask = with_one_more(mask, batch);
        const Tokens all = positions_of(mask, batch);
        positions.resize(batch);
        for (std::size_t row = 0; row < batch; ++row) positions[row] = all[(row + 1) * (all.size() / batch) - 1];
    }
    return answers;
}

std::vector<std::vector<float>> Runner::encode(const std::vector<Tokens>& inputs, const AdapterNames& adapters) const {
    if (generates()) throw Error(folder_->path.string() + ": generates text; it gives no vectors.");
    check(inputs);
    const std::vector<Found> found = find(adapters, inputs.size());
    const std::size_t width = longest(inputs);
    std::vector<std::vector<float>> vectors(inputs.size());
    for (const Rows& rows : batches(found, inputs.size(), slot_count(*backend_))) {
        const HeldRows held(*backend_, picked(found, rows));
        const std::vector<Tokens> theirs = picked(inputs, rows);
        const std::vector<float> values =
            backend_->encode(pad(theirs, width, folder_->padding, false), pad(ones_like(theirs), width, 0, false),
                             rows.size(), held.slots());
        const std::size_t each = values.size() / rows.size();
        for (std::size_t i = 0; i < rows.size(); ++i) {
            const auto start = values.begin() + static_cast<std::ptrdiff_t>(i * each);
            // Of hidden states, those of padding mean nothing.
            require_numbers(start, start + static_cast<std::ptrdiff_t>(std::max<std::size_t>(
                                               each * theirs[i].size() / width, std::min<std::size_t>(each, 1))));
            vectors[rows[i]].assign(start, start + static_cast<std::ptrdiff_t>(each));
        }
    }
    return vectors;
}

std::vector<std::string> Runner::adapters() const {
    return backend_->adapters() == nullptr ? std::vector<std::string>() : backend_->adapters()->names();
}

std::vector<Found> Runner::find(const AdapterNames& adapters, std::size_t count) const {
    std::vector<Found> found(count);
    if (adapters.empty()) return found;
    if (adapters.size() != count) {
        throw Error(std::to_string(adapters.size()) + " adapters for " + std::to_string(count) +
                    " prompts: name one for each.");
    }
    for (std::size_t row = 0; row < count; ++row) {
        const std::optional<std::string>& name = adapters[row];
        if (!name) continue;
        if (backend_->adapters() == nullptr) {
            throw Error(folder_->path.string() + ": has one adapter of its own, and no other ('" + name->substr(0, 80) +
                        "').");
        }
        const auto earlier = std::find(adapters.begin(), adapters.begin() + static_cast<std::ptrdiff_t>(row), name);
        const auto first = static_cast<std::size_t>(earlier - adapters.begin());
        found[row] = first < row ? found[first] : backend_->adapters()->find(*name);
    }
    return found;
}

void Runner::check(const std::vector<Tokens>& rows) const {
    if (rows.empty()) throw Error("There is no prompt.");
    const auto most = static_cast<std::size_t>(folder_->most_tokens);
    for (const Tokens& row : rows) {
        if (most > 0 && row.size() > most) {
            throw Error(std::to_string(row.size()) + " tokens; the model takes " + std::to_string(most) + ".");
        }
        if (row.empty()) throw Error("An empty prompt has nothing to go on from.");
        for (const std::int64_t token : row) {
            if (token < 0 || (folder_->vocabulary > 0 && token >= folder_->vocabulary)) {
                throw Error("Token " + std::to_string(token) + " is not in the model's vocabulary of " +
                            std::to_string(folder_->vocabulary) + ".");
            }
        }
    }
}

// How many tokens can follow a prompt of `width`.
std::size_t Runner::room(std::size_t width, std::size_t count) const {
    if (count == 0) throw Error("0 tokens: give at least 1.");
    const auto most = static_cast<std::size_t>(folder_->most_tokens);
    if (most == 0) return count;
    if (width == most) {
        throw Error(std::to_string(width) + " tokens; the model takes " + std::to_string(most) +
                    ", its answer included.");
    }
    return std::min(count, most - width);
}

bool is_past(const std::string& name) { return starts_with(name, "past_key_values."); }

bool is_present(const std::string& name) { return starts_with(name, "present."); }

std::string past_name(const std::string& present) { return "past_key_values" + present.substr(present.find('.')); }

}  // namespace teamlora
