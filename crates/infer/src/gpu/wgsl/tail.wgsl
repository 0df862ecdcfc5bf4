if (lane == p.units % LANES) {
        for (var i = 0u; i < p.tail; i++) {
            let c = p.units * (4u * UNIT4) + i;
            let value = element(base, c);
            for (var t = 0u; t < TOKENS; t++) {
                if (first + t < p.tokens) {
                    sums[t].x = fma(value, x[p.x + (first + t) * p.x_stride + c], sums[t].x);
                }
            }
        }
    }
