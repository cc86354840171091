// Sums a block's rows under secret multipliers; kvstore/block/row_sums.py says what for, and has the same in numpy.
//
// Plain C that compilers vectorize; where the processor has wider vectors, the loader takes the clone that uses them.

#include <stdint.h>

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES
#endif

enum { ROW_WORDS = 1024 };

// Adds to the sums of a row what some of its words come to; `even` and `odd` begin with the multipliers of the first.
CLONES static void add_to_row(
    const uint64_t *words, int64_t num_words, const uint64_t *even, const uint64_t *odd, uint64_t *sums)
{
    uint64_t first = 0, second = 0;
    for (int64_t j = 0; j < num_words; j++) {
        uint64_t low = words[j] & 0xffffffffu, high = words[j] >> 32;
        first += low * even[j] + high * odd[j];
        second += low * odd[j] + high * even[j + 1];
    }
    sums[0] += first;
    sums[1] += second;
}

// Four whole rows at a time: memory is read in four places at once, and each multiplier once for all.
CLONES static void sum_four_rows(const uint64_t *words, const uint64_t *even, const uint64_t *odd, uint64_t *sums)
{
    uint64_t first[4] = {0}, second[4] = {0};
    for (int64_t j = 0; j < ROW_WORDS; j++) {
        uint64_t even_here = even[j], odd_here = odd[j], even_next = even[j + 1];
        for (int row = 0; row < 4; row++) {
            uint64_t word = words[row * ROW_WORDS + j], low = word & 0xffffffffu, high = word >> 32;
            first[row] += low * even_here + high * odd_here;
            second[row] += low * odd_here + high * even_next;
        }
    }
    for (int row = 0; row < 4; row++) {
        sums[2 * row] = first[row];
        sums[2 * row + 1] = second[row];
    }
}

// A block is `num_pieces` pieces of `piece_words`, `piece_stride` bytes apart, and its rows go on from one to the next.
// `even` has ROW_WORDS + 1 multipliers, `odd` ROW_WORDS; `sums` takes two numbers for each begun row, and comes as zeros.
__attribute__((visibility("default"))) void tandem_row_sums_2(
    const char *block, int64_t num_pieces, int64_t piece_stride, int64_t piece_words,
    const uint64_t *even, const uint64_t *odd, uint64_t *sums)
{
    int64_t begun = 0;  // words of the row that the last piece has begun and not ended
    for (int64_t piece = 0; piece < num_pieces; piece++) {
        const uint64_t *words = (const uint64_t *)(block + piece * piece_stride), *end = words + piece_words;
        while (words < end) {
            int64_t left = end - words;
            if (begun == 0 && left >= 4 * ROW_WORDS) {
                sum_four_rows(words, even, odd, sums);
                words += 4 * ROW_WORDS;
                sums += 8;
                continue;
            }
            int64_t taken = left < ROW_WORDS - begun ? left : ROW_WORDS - begun;
            add_to_row(words, taken, even + begun, odd + begun, sums);
            words += taken;
            begun += taken;
            if (begun == ROW_WORDS) {
                begun = 0;
                sums += 2;
            }
        }
    }
}
