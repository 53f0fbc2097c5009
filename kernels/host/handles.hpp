// The objects behind the driver's opaque handles: a handle that was never given out, or is destroyed, is an
// error.
#pragma once

#include <memory>
#include <unordered_map>

#include "error.hpp"

namespace host {

template <class T> class Handles {
  public:
    explicit Handles(const char* noun) : noun_(noun) {}

    T* add(std::unique_ptr<T> object) {
        T* handle = object.get();
        objects_.emplace(handle, std::move(object));
        return handle;
    }

    Status find(void* handle, T** object) const {
        const auto found = objects_.find(handle);
        if (found == objects_.end())
            return failure(Code::invalid_handle, "%p is not a live %s", handle, noun_);
        *object = found->second.get();
        return success();
    }

    Status remove(void* handle) {
        if (objects_.erase(handle) == 0)
            return failure(Code::invalid_handle, "%p is not a live %s, so it cannot be destroyed", handle,
                           noun_);
        return success();
    }

    /// Removes every object for which `condition` holds.
    template <class Condition> void remove_if(Condition condition) {
        for (auto i = objects_.begin(); i != objects_.end();)
            i = condition(*i->second) ? objects_.erase(i) : ++i;
    }

    template <class Visit> void for_each(Visit visit) {
        for (auto& [handle, object] : objects_) visit(*object);
    }

  private:
    const char* noun_;
    std::unordered_map<void*, std::unique_ptr<T>> objects_;
};

} // namespace host
