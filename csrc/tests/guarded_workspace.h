// Workspaces of their exact size, so that AddressSanitizer sees their ends, filled with NaN, so that what is read
// before it was written shows. In programs linked with --wrap for both (CMakeLists.txt) calls of Workspace's
// constructor and destructor come here instead of to the arena.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {
bool refuse_workspaces = false;
int workspaces_granted = -1;  // before the others are refused; negative: all

struct GuardedWorkspace {  // laid out as irt::Workspace
  void* data;
  size_t bytes;
};
}  // namespace

extern "C" void __wrap__ZN3irt9WorkspaceC1Em(GuardedWorkspace* self, size_t bytes);
extern "C" void __wrap__ZN3irt9WorkspaceD1Ev(GuardedWorkspace* self);

extern "C" void __wrap__ZN3irt9WorkspaceC1Em(GuardedWorkspace* self, size_t bytes) {
  constexpr size_t kMost = size_t{1} << 32;  // a test needs no more: what does is a size computed wrongly, or a refusal
  self->bytes = bytes;
  const bool refused = bytes > kMost || refuse_workspaces || workspaces_granted == 0;
  if (workspaces_granted > 0) --workspaces_granted;
  self->data = refused ? nullptr : aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (self->data) memset(self->data, 0xff, bytes);
}
extern "C" void __wrap__ZN3irt9WorkspaceD1Ev(GuardedWorkspace* self) { free(self->data); }
