#include "kernel.hpp"

namespace host {
namespace {

struct Table {
    std::vector<Kernel> rows;
    std::string error;
};

/// Built on first use: registrations run before main in no particular order.
Table& table() {
    static auto& instance = *new Table;
    return instance;
}

std::string stem(std::string path) {
    path.erase(0, path.find_last_of('/') + 1);
    return path.substr(0, path.find('.'));
}

} // namespace

void register_kernel(Kernel kernel, const char* file) {
    kernel.family = stem(file);
    if (const Kernel* other = find_kernel(kernel.name)) {
        table().error += "kernel `" + kernel.name + "` is registered by both " + other->family + ".cu and " +
                         kernel.family + ".cu; ";
        return;
    }
    table().rows.push_back(std::move(kernel));
}

const std::vector<Kernel>& kernels() { return table().rows; }

const Kernel* find_kernel(const std::string& name) {
    for (const Kernel& kernel : table().rows)
        if (kernel.name == name) return &kernel;
    return nullptr;
}

const std::string& registration_error() { return table().error; }

} // namespace host
