// Workspaces for CPU kernels, and large results: 2 MB-aligned blocks whose memory is kept and reused, because filling
// fresh memory costs an order of magnitude more than filling memory the process already has (page faults). One arena
// per process, bounded: it holds at most what was ever used at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace irt {

// A block of at least `bytes` for the life of this object; null data() when memory cannot be had.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace irt
