/* All kernels, on whichever panel was included before. */
#include "attention.h"
#include "linear.h"
#include "tokens.h"

/* The version of the calls: library.py refuses a library that was built from other sources. */
EXPORT int tandem_version(void) { return 1; }

EXPORT const char *tandem_name(void) { return PANEL_NAME; }

/* Make this process able to run the kernels; 0 if the system does not let it. */
EXPORT int tandem_start(void) { return panel_start(); }
