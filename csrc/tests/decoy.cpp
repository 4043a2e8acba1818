// Built as libompl.so: mapped, named like an OpenMP runtime, and none. (A motion planning library really has this
// name.)
extern "C" __attribute__((visibility("default"))) int ompl_version() { return 1; }
