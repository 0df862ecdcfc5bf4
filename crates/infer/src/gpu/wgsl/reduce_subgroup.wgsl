for (var step = LANES / 2u; step > 0u; step /= 2u) {
        for (var t = 0u; t < TOKENS; t++) {
            lanes[t] += subgroupShuffleXor(lanes[t], step);
        }
    }
