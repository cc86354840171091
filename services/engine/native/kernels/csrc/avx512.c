#include "panel_avx512.h"
#include "library.h"
