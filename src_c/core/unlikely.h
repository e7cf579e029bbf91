/* Which way most calls take. What the others ask for is put out of the way by compilers: a small call takes as long as its instructions take
 * to fetch. */
#ifndef FA_UNLIKELY_H
#define FA_UNLIKELY_H

#ifdef __GNUC__
#define FA_LIKELY(condition) ((int)__builtin_expect(!!(condition), 1))
#define FA_UNLIKELY(condition) ((int)__builtin_expect(!!(condition), 0))
#else
#define FA_LIKELY(condition) (condition)
#define FA_UNLIKELY(condition) (condition)
#endif

#endif
