"""The C99 functions that a generated file may need: integers alone, no shift of a negative number, nothing that overflows."""

from __future__ import annotations

from lowbit.formats.fixed_point.constants import Arithmetic

FLOOR_SHIFT = """\
/* x / 2**shift rounded down, for 0 <= shift <= 63 */
static int64_t floor_shift(int64_t x, int32_t shift)
{
    return x >= 0 ? x >> shift : ~(~x >> shift);
}
"""

HALF_EVEN_SHIFT = """\
/* x / 2**shift to nearest, ties to even, for 0 <= shift <= 63 */
static int64_t half_even_shift(int64_t x, int32_t shift)
{
    int64_t down;
    uint64_t rest, half;

    if (shift == 0)
        return x;
    down = floor_shift(x, shift);
    rest = (uint64_t)x & (((uint64_t)1 << shift) - 1);
    half = (uint64_t)1 << (shift - 1);
    return down + (rest > half || (rest == half && ((uint64_t)down & 1) != 0));
}
"""

_RESCALE = {
    ("fixed_point", "single"): """\
/* x * multiplier * 2**(shift - 31), rounded once, ties up */
static int64_t rescale(int32_t x, int32_t multiplier, int32_t shift)
{
    int32_t right = 31 - shift;

    return floor_shift((int64_t)x * multiplier + ((int64_t)1 << (right - 1)), right);
}
""",
    ("fixed_point", "double"): """\
/* x * multiplier * 2**(shift - 31), rounded to 31 bits, ties up, and after the shift to the right, ties away from zero */
static int64_t rescale(int32_t x, int32_t multiplier, int32_t shift)
{
    int64_t left = shift > 0 ? (int64_t)1 << shift : 1;
    int64_t high = floor_shift((int64_t)x * left * multiplier + ((int64_t)1 << 30), 31);
    int64_t half;

    if (shift >= 0)
        return high;
    half = (int64_t)1 << (-shift - 1);
    return high >= 0 ? (high + half) >> -shift : -((half - high) >> -shift);
}
""",
    ("dyadic", "single"): """\
/* x * multiplier * 2**(shift - 31) to nearest, ties to even */
static int64_t rescale(int32_t x, int32_t multiplier, int32_t shift)
{
    return half_even_shift((int64_t)x * multiplier, 31 - shift > 63 ? 63 : 31 - shift);
}
""",
}

CLAMP = """\
static int8_t clamp(int64_t code, int32_t lowest, int32_t highest)
{
    return (int8_t)(code < lowest ? lowest : code > highest ? highest : code);
}
"""

WEIGHTS = """\
struct weights {
    const uint8_t *packed;      /* codes of `bits` bits each, the lowest bits first; or null */
    const int8_t *plain;        /* codes of 8 bits; or null */
    int32_t row;                /* codes of an output channel */
    int32_t bits, step, lowest; /* a packed code stands for code * step + lowest */
    const int32_t *factor;      /* a sum of products is multiplied by factor[channel * factor_step] ... */
    int32_t factor_step;
    const int32_t *bias;        /* ... before this is added */
    const int32_t *multiplier;  /* of the accumulator */
    const int8_t *shift;
    int32_t x_zero, y_zero, y_lowest, y_highest;
};
"""

FILTER_PLAIN = """\
static const filter_t *filter_of(const struct weights *w, int32_t channel)
{
    return w->plain + channel * w->row;
}
"""

_FILTER_PACKED = """\
static filter_t filter[FILTER_SIZE];

static const filter_t *filter_of(const struct weights *w, int32_t channel)
{
    uint32_t position = (uint32_t)(channel * w->row) * (uint32_t)w->bits;
    int32_t i;

PLAIN    for (i = 0; i < w->row; i++, position += (uint32_t)w->bits) {
        uint32_t at = position >> 3, offset = position & 7u, code = (uint32_t)w->packed[at] >> offset;

        if (offset + (uint32_t)w->bits > 8u)
            code |= (uint32_t)w->packed[at + 1u] << (8u - offset);
        filter[i] = (filter_t)((int32_t)(code & ((1u << w->bits) - 1u)) * w->step + w->lowest);
    }
    return filter;
}
"""
FILTER_PACKED = _FILTER_PACKED.replace(
    "PLAIN",
    """\
    if (w->plain != 0)
        return w->plain + channel * w->row;
""",
)
FILTER_WIDE = _FILTER_PACKED.replace(
    "PLAIN",
    """\
    if (w->plain != 0) {
        for (i = 0; i < w->row; i++)
            filter[i] = w->plain[channel * w->row + i];
        return filter;
    }
""",
)

FINISH = """\
static int8_t finish(const struct weights *w, int32_t channel, int32_t sum)
{
    int32_t acc = sum * w->factor[channel * w->factor_step] + w->bias[channel];

    return clamp(rescale(acc, w->multiplier[channel], w->shift[channel]) + w->y_zero, w->y_lowest, w->y_highest);
}
"""

CONVOLUTION = """\
struct convolution {
    struct weights w;
    int32_t height, width, out_channels, out_height, out_width;
    int32_t channels, out_per_group; /* of a group */
    int32_t kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x, padding_y, padding_x;
};

static void convolve(const struct convolution *c, const int8_t *x, int8_t *y)
{
    int32_t o, i, j, k, u, v;

    for (o = 0; o < c->out_channels; o++) {
        const filter_t *rows = filter_of(&c->w, o);
        const int8_t *group = x + o / c->out_per_group * c->channels * c->height * c->width;

        for (i = 0; i < c->out_height; i++) {
            for (j = 0; j < c->out_width; j++) {
                const filter_t *weight = rows;
                int32_t sum = 0;

                for (k = 0; k < c->channels; k++) {
                    for (u = 0; u < c->kernel_height; u++, weight += c->kernel_width) {
                        int32_t row = i * c->stride_y - c->padding_y + u * c->dilation_y;

                        if (row < 0 || row >= c->height)
                            continue;
                        for (v = 0; v < c->kernel_width; v++) {
                            int32_t column = j * c->stride_x - c->padding_x + v * c->dilation_x;

                            if (column >= 0 && column < c->width)
                                sum += weight[v] * (group[(k * c->height + row) * c->width + column] - c->w.x_zero);
                        }
                    }
                }
                *y++ = finish(&c->w, o, sum);
            }
        }
    }
}
"""

VOLUME = """\
struct volume {
    struct weights w;
    int32_t size[3], out[3];                                          /* depth, height, width */
    int32_t out_channels, channels, out_per_group;                    /* channels of a group */
    int32_t kernel[3], stride[3], dilation[3], padding[3], spread[3]; /* input i lies at i * spread, zeros between */
};

/* the input along an axis that a place of the kernel reads, or -1 where that is a zero */
static int32_t input_at(const struct volume *c, int32_t axis, int32_t out, int32_t place)
{
    int32_t at = out * c->stride[axis] - c->padding[axis] + place * c->dilation[axis];

    if (at < 0 || at % c->spread[axis] != 0 || at / c->spread[axis] >= c->size[axis])
        return -1;
    return at / c->spread[axis];
}

static void convolve_volume(const struct volume *c, const int8_t *x, int8_t *y)
{
    int32_t o, n, k, u, v, w, plane, row, column;
    int32_t outputs = c->out[0] * c->out[1] * c->out[2], area = c->size[1] * c->size[2];

    for (o = 0; o < c->out_channels; o++) {
        const filter_t *rows = filter_of(&c->w, o);
        const int8_t *group = x + o / c->out_per_group * c->channels * c->size[0] * area;

        for (n = 0; n < outputs; n++) {
            const filter_t *weight = rows;
            int32_t sum = 0, i = n / (c->out[1] * c->out[2]), j = n / c->out[2] % c->out[1], l = n % c->out[2];

            for (k = 0; k < c->channels; k++) {
                for (u = 0; u < c->kernel[0]; u++) {
                    plane = input_at(c, 0, i, u);
                    for (v = 0; v < c->kernel[1]; v++, weight += c->kernel[2]) {
                        row = input_at(c, 1, j, v);
                        if (plane < 0 || row < 0)
                            continue;
                        for (w = 0; w < c->kernel[2]; w++) {
                            column = input_at(c, 2, l, w);
                            if (column >= 0)
                                sum += weight[w] * (group[((k * c->size[0] + plane) * c->size[1] + row) * c->size[2] + column] - c->w.x_zero);
                        }
                    }
                }
            }
            *y++ = finish(&c->w, o, sum);
        }
    }
}
"""

LINEAR = """\
struct linear {
    struct weights w;
    int32_t rows, out_channels;
};

static void multiply(const struct linear *l, const int8_t *x, int8_t *y)
{
    int32_t o, r, i;

    for (o = 0; o < l->out_channels; o++) {
        const filter_t *weight = filter_of(&l->w, o);

        for (r = 0; r < l->rows; r++) {
            int32_t sum = 0;

            for (i = 0; i < l->w.row; i++)
                sum += weight[i] * (x[r * l->w.row + i] - l->w.x_zero);
            y[r * l->out_channels + o] = finish(&l->w, o, sum);
        }
    }
}
"""

_SUM_HEAD = """\
struct sum {
    int32_t operands, size;
    const int32_t *zero, *sign, *multiplier, *shift; /* of each operand */
    int64_t offset;
    int32_t y_multiplier, y_shift, y_zero, y_lowest, y_highest;
};

static void add(const struct sum *s, const int8_t *const *x, int8_t *y)
{
    int32_t i, n;

    for (i = 0; i < s->size; i++) {
        int64_t total = s->offset;

        for (n = 0; n < s->operands; n++) {
            int32_t distance = s->sign[n] * (x[n][i] - s->zero[n]);

"""
_SUM = {
    "fixed_point": """\
            total += rescale(distance * ((int32_t)1 << 20), s->multiplier[n], s->shift[n]);
        }
        y[i] = clamp(rescale((int32_t)total, s->y_multiplier, s->y_shift) + s->y_zero, s->y_lowest, s->y_highest);
    }
}
""",
    "dyadic": """\
            total += (int64_t)distance * s->multiplier[n];
        }
        y[i] = clamp(half_even_shift(total, 31 - s->y_shift > 63 ? 63 : 31 - s->y_shift) + s->y_zero, s->y_lowest, s->y_highest);
    }
}
""",
}

AVERAGE_POOL = """\
struct average_pool {
    int32_t channels, height, width, out_height, out_width;
    const uint16_t *rows, *columns; /* first and behind the last of each window */
    const uint8_t *divisor;         /* which of the divisors each output has; or null where there is one */
    const int32_t *multiplier, *offset;
    const int8_t *shift;
    int32_t left, x_zero, y_zero, y_lowest, y_highest; /* sums are multiplied by 2**left */
};

static void average(const struct average_pool *p, const int8_t *x, int8_t *y)
{
    int32_t c, i, j, u, v;

    for (c = 0; c < p->channels; c++, x += p->height * p->width) {
        for (i = 0; i < p->out_height; i++) {
            for (j = 0; j < p->out_width; j++) {
                int32_t sum = 0, d = p->divisor == 0 ? 0 : p->divisor[i * p->out_width + j];

                for (u = p->rows[2 * i]; u < p->rows[2 * i + 1]; u++)
                    for (v = p->columns[2 * j]; v < p->columns[2 * j + 1]; v++)
                        sum += x[u * p->width + v] - p->x_zero;
                *y++ = clamp(rescale(sum * ((int32_t)1 << p->left) + p->offset[d], p->multiplier[d], p->shift[d]) + p->y_zero, p->y_lowest, p->y_highest);
            }
        }
    }
}
"""

MAX_POOL = """\
struct max_pool {
    int32_t channels, height, width, out_height, out_width, step_y, step_x;
    const uint16_t *rows, *columns; /* first and behind the last of each window */
};

static void largest(const struct max_pool *p, const int8_t *x, int8_t *y)
{
    int32_t c, i, j, u, v;

    for (c = 0; c < p->channels; c++, x += p->height * p->width) {
        for (i = 0; i < p->out_height; i++) {
            for (j = 0; j < p->out_width; j++) {
                int8_t found = INT8_MIN;

                for (u = p->rows[2 * i]; u < p->rows[2 * i + 1]; u += p->step_y)
                    for (v = p->columns[2 * j]; v < p->columns[2 * j + 1]; v += p->step_x)
                        if (x[u * p->width + v] > found)
                            found = x[u * p->width + v];
                *y++ = found;
            }
        }
    }
}
"""

COPY = """\
struct copy {
    int32_t rank;
    const int32_t *shape, *from, *to; /* sizes, strides in the source and in the target */
    int32_t from_offset, to_offset;
};

static void copy(const struct copy *c, const int8_t *x, int8_t *y)
{
    int32_t index[MOST_DIMENSIONS] = {0}, d;

    x += c->from_offset;
    y += c->to_offset;
    for (;;) {
        int32_t from = 0, to = 0;

        for (d = 0; d < c->rank; d++) {
            from += index[d] * c->from[d];
            to += index[d] * c->to[d];
        }
        y[to] = x[from];
        for (d = c->rank - 1; d >= 0 && ++index[d] == c->shape[d]; d--)
            index[d] = 0;
        if (d < 0)
            return;
    }
}
"""


def rescale_kernel(arithmetic: Arithmetic) -> str:
    """The function that multiplies an accumulator."""
    return _RESCALE[arithmetic.kind, "single" if arithmetic.kind == "dyadic" else arithmetic.rounding]


def sum_kernel(arithmetic: Arithmetic) -> str:
    """The function that adds tensors."""
    return _SUM_HEAD + _SUM[arithmetic.kind]
