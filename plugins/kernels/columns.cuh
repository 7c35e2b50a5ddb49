// The columns of y, cut into tiles that never reach across two siblings.
#pragma once

#include "device.cuh"
#include "mixed_expert.h"

namespace teamlora {

struct ColumnTile {
    int sibling;
    int first;  // column of y
    int width;  // columns left of this sibling from there: may be more than a tile's, never of the next sibling
};

struct Columns {
    int num_siblings;
    int widths[kMaxSiblings];

    __host__ __device__ int num_tiles(int tile_width) const {
        int sum = 0;
        for (int g = 0; g < num_siblings; ++g) sum += (widths[g] + tile_width - 1) / tile_width;
        return sum;
    }

    __device__ ColumnTile tile(int index, int tile_width) const {
        int first = 0;
#pragma unroll
        for (int g = 0; g < kMaxSiblings; ++g) {
            const int tiles = (widths[g] + tile_width - 1) / tile_width;
            if (index < tiles || g == num_siblings - 1) {
                return {g, first + index * tile_width, widths[g] - index * tile_width};
            }
            index -= tiles;
            first += widths[g];
        }
        return {};
    }
};

}  // namespace teamlora
