for (var t = 0u; t < TOKENS; t++) {
        partial[t * WIDTH + index] = lanes[t];
    }
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            for (var t = 0u; t < TOKENS; t++) {
                partial[t * WIDTH + index] += partial[t * WIDTH + index + step];
            }
        }
    }
    if (lane == 0u) {
        for (var t = 0u; t < TOKENS; t++) {
            lanes[t] = partial[t * WIDTH + index];
        }
    }
