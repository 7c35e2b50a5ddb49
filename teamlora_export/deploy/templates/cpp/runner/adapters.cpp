#include "adapters.h"

#include <sys/stat.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "error.h"

namespace teamlora {
namespace {

constexpr std::size_t kNamesShown = 8;

std::string some_names(const Shelf& shelf) {
    std::string text;
    std::size_t shown = 0;
    for (const auto& adapter : shelf.adapters) {
        if (shown++ == kNamesShown)
            return text + " and " + std::to_string(shelf.adapters.size() - kNamesShown) + " more";
        text += (text.empty() ? "" : ", ") + adapter.first;
    }
    return text.empty() ? "none" : text;
}

}  // namespace

Adapters::Adapters(const Folder& folder, const Options& options, std::vector<SlotInput> inputs, SlotMemory& memory)
    : folder_(folder),
      check_(options.check_files),
      patience_(options.patience),
      inputs_(std::move(inputs)),
      memory_(memory) {
    if (options.patience < 0) throw Error(std::to_string(options.patience) + " seconds of patience: give 0 or more.");
    const std::size_t slots = folder.shelf.value().slots;
    content_.resize(slots);
    users_.resize(slots);
    for (std::size_t slot = 0; slot < slots; ++slot) free_.push_back(slot);
}

Adapters::Held::Held(Held&& other) noexcept
    : adapters_(std::exchange(other.adapters_, nullptr)),
      rows_(std::move(other.rows_)),
      slots_(std::move(other.slots_)) {}

Adapters::Held::~Held() {
    if (adapters_ != nullptr) adapters_->give(slots_);
}

std::vector<std::string> Adapters::names() {
    const std::lock_guard<std::mutex> lock(listing_);
    look_again();
    std::vector<std::string> names;
    for (const auto& adapter : shelf_.adapters) names.push_back(adapter.first);
    return names;
}

Found Adapters::find(const std::string& name) {
    const std::lock_guard<std::mutex> lock(listing_);
    for (Stamp before;;) {
        look_again();
        const auto there = shelf_.adapters.find(name);
        if (there == shelf_.adapters.end()) {
            throw Error("There is no adapter '" + name.substr(0, 80) + "'; there are " + some_names(shelf_) + ".");
        }
        try {
            const auto& [file, sha256] = there->second;
            const std::string key = (folder_.path / file).string() + '\n' + sha256;
            const auto opened = opened_.find(key);
            Found found = opened == opened_.end() ? nullptr : opened->second.lock();
            if (found == nullptr) {
                found.reset(new Shelved{OpenedFile(folder_.path / file), sha256});
                for (auto each = opened_.begin(); each != opened_.end();) {
                    each = each->second.expired() ? opened_.erase(each) : std::next(each);
                }
                opened_[key] = found;
            }
            return found;
        } catch (const Error&) {
            // It may have been replaced since the list was read.
            if (seen_ == before) throw;
            before = std::exchange(seen_, Stamp());
        }
    }
}

Adapters::Held Adapters::take(const std::vector<Found>& rows) {
    std::vector<Found> wanted;
    for (const Found& row : rows) {
        const auto same = [&](const Found& other) { return other->key() == row->key(); };
        if (row != nullptr && std::none_of(wanted.begin(), wanted.end(), same)) wanted.push_back(row);
    }
    if (wanted.size() > slots()) {
        throw Error(std::to_string(wanted.size()) + " adapters for " + std::to_string(slots()) + " slots.");
    }
    if (wanted.empty()) {
        Held none(*this);
        none.rows_.assign(rows.size(), kNoAdapter);
        return none;
    }
    const Clock::time_point since = Clock::now();
    const std::lock_guard<std::mutex> turn(turn_);
    std::vector<std::pair<Found, SlotFile>> read;
    for (const Found& adapter : wanted) {
        if (slot_of(adapter->key()) == slots()) {
            read.emplace_back(adapter, read_slot(adapter->file, check_ ? adapter->sha256 : "", inputs_));
        }
    }
    Held held(*this);
    std::vector<std::size_t> written;
    {
        std::unique_lock<std::mutex> lock(counts_);
        wait_for_slots(lock, wanted, since);
        // Those that are there first: the others must not take their slots.
        for (const Found& adapter : wanted) {
            if (slot_of(adapter->key()) < slots()) hold(slot_of(adapter->key()), held);
        }
        for (std::size_t i = 0; i < read.size(); ++i) {
            written.push_back(free_.front());
            content_[free_.front()].clear();
            hold(free_.front(), held);
        }
    }
    for (std::size_t i = 0; i < read.size(); ++i) {
        memory_.fill(written[i], read[i].second);
        content_[written[i]] = read[i].first->key();
    }
    for (const Found& row : rows) {
        held.rows_.push_back(row == nullptr ? kNoAdapter : static_cast<std::int32_t>(slot_of(row->key())));
    }
    return held;
}

void Adapters::wait_for_slots(std::unique_lock<std::mutex>& lock, const std::vector<Found>& wanted,
                              Clock::time_point since) {
    const auto in_use = [&](const Found& adapter) {
        const std::size_t slot = slot_of(adapter->key());
        return slot < slots() && users_[slot] > 0;
    };
    const auto fits = [&] {
        const auto used = std::count_if(wanted.begin(), wanted.end(), in_use);
        return wanted.size() - static_cast<std::size_t>(used) <= free_.size();
    };
    while (!fits()) {
        since = std::max(since, moved_.load());
        if (Clock::now() - since >= patience_) {
            throw Error("Others' adapters are in too many of the " + std::to_string(slots()) +
                        " slots, and none of their requests has gone on for " + std::to_string(patience_.count()) +
                        " seconds.");
        }
        given_.wait_until(lock, since + patience_);
    }
}

void Adapters::went_on() { moved_ = Clock::now(); }

Adapters::Stamp Adapters::stamp() const {
    struct stat found{};
    if (stat(folder_.description().c_str(), &found) != 0) return {};
    return {found.st_mtim.tv_sec, found.st_mtim.tv_nsec, found.st_ino, static_cast<std::uint64_t>(found.st_size)};
}

void Adapters::look_again() {
    const Stamp now = stamp();
    if (!(seen_ == Stamp()) && seen_ == now) return;
    Folder folder = open_folder(folder_.path, false);
    if (folder.model_sha256 != folder_.model_sha256) {
        throw Error(folder_.path.string() + ": holds another model by now, and adapters of that. Open it anew.");
    }
    shelf_ = folder.shelf.value_or(Shelf());
    seen_ = now;
}

std::size_t Adapters::slot_of(const std::string& key) const {
    return static_cast<std::size_t>(std::find(content_.begin(), content_.end(), key) - content_.begin());
}

void Adapters::hold(std::size_t slot, Held& held) {
    held.slots_.push_back(slot);
    if (users_[slot]++ == 0) free_.erase(std::find(free_.begin(), free_.end(), slot));
}

void Adapters::give(const std::vector<std::size_t>& slots) {
    went_on();
    {
        const std::lock_guard<std::mutex> lock(counts_);
        for (const std::size_t slot : slots) {
            if (--users_[slot] == 0) free_.push_back(slot);
        }
    }
    given_.notify_all();
}

}  // namespace teamlora
