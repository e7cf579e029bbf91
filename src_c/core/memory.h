/* Where memory comes from when a caller hands in none: the C library, or functions of the program's own, which a build names
 * (-DFASTATTN_MALLOC=my_malloc -DFASTATTN_FREE=my_free). They may return null; nothing else in the library allocates. */
#ifndef FA_MEMORY_H
#define FA_MEMORY_H

#include <stdlib.h>

#ifdef FASTATTN_MALLOC
void *FASTATTN_MALLOC(size_t size);
void FASTATTN_FREE(void *memory);
#else
#define FASTATTN_MALLOC malloc
#define FASTATTN_FREE free
#endif

#endif
