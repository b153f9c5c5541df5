// Values by key, of which the ones that were used last are kept.
#pragma once

#include <list>
#include <unordered_map>
#include <utility>

namespace ldm::runtime {

template <class Key, class Value>
class Cache {
  public:
    explicit Cache(std::size_t capacity) : capacity_(capacity) {}

    // The value, or null; valid until the next call.
    const Value *find(const Key &key) {
        const auto found = places_.find(key);
        if (found == places_.end()) return nullptr;
        entries_.splice(entries_.begin(), entries_, found->second);
        return &found->second->second;
    }

    void insert(const Key &key, Value value) {
        if (find(key) != nullptr) return;
        entries_.emplace_front(key, std::move(value));
        places_.emplace(key, entries_.begin());
        if (entries_.size() > capacity_) {
            places_.erase(entries_.back().first);
            entries_.pop_back();
        }
    }

  private:
    std::size_t capacity_;
    std::list<std::pair<Key, Value>> entries_;  // the newest first
    std::unordered_map<Key, typename std::list<std::pair<Key, Value>>::iterator> places_;
};

}  // namespace ldm::runtime
