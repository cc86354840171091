#include "panel_neon.h"
#include "library.h"
