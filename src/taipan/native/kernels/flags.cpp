// What the library was compiled with, for `taipan doctor`.
extern "C" const char* taipan_flags() { return TAIPAN_FLAGS; }
