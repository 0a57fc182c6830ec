// The mean over the rows of a sequence, which is its encoding.

struct Mean {
    const T *x;
    const Sequence *sequences;
    float *out; // (sequences, d)
    int d;
};

// out[sequence] = mean of x over its rows, a thread per column; added row by row, as the processor adds
extern "C" __global__ void mean_rows(Mean a) {
    begin();
    const Sequence sequence = a.sequences[blockIdx.x];
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= a.d) return;
    const T *x = a.x + u64(sequence.first_row) * a.d + column;
    float sum = 0;
    for (int row = 0; row < sequence.rows; row++) sum += widen(x[u64(row) * a.d]);
    a.out[u64(blockIdx.x) * a.d + column] = __fdiv_rn(sum, float(sequence.rows));
}
