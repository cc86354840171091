#include "panel_avx2.h"
#include "library.h"
