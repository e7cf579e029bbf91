/* Sums of values that leave the range of float32.
 *
 * The mean of finite values is finite; their sum, which is what o is until the end, need not be. Scaling every sum would cost
 * everyone a pass, so the panel is computed as if nothing could happen, and what is not finite is found as it is written: its
 * sums are formed again from values times FA_SHRINK, small enough for any number of keys and large enough that what falls
 * below float32 is nothing beside a sum that did not fit. */
#ifndef FA_RANGE_H
#define FA_RANGE_H

#include "panel.h"
#include "state.h"

#define FA_SHRINK 0x1p-64f

/* Whether a sum of a row is not finite although its powers are. (It may be that a value is not; then the second time makes no
 * difference.) */
int fastattn_sums_overflow(const fa_call *call, const fa_panel *panel, const fa_state *state);

/* The numbers of the panel's outputs that are not finite, from sums of values times FA_SHRINK; those of row r times factor[r] are
 * means. */
void fastattn_replace_means(const fa_call *call, const fa_panel *panel, const fa_state *state, const float *factor);

#endif
