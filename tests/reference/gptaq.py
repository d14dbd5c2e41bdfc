"""GPTAQ in float64, straight from algorithm 1 of arXiv:2504.02692: one column at a time, every correction at once.

U is the upper Cholesky factor of the damped inverse Hessian (formed explicitly here); P = alpha triu(D U^T, 1) U.
After column i is quantized, every later column j becomes w_j - e U_ij + w_i P_ij, with e = (w_i - q_i) / U_ii and w_i
the value that was quantized.
"""

import torch


def quantize(weight, hessian, drift, quantize_column, *, alpha, damping=0.01, order=None):
    """Quantized values [O, I] in float64.

    Args:
        quantize_column: (column, its place in the original order) -> quantized column, all float64.
        order: the original places in the order of quantization; None is as they are.
    """
    weight, hessian, drift = weight.double().clone(), hessian.double().clone(), drift.double().clone()
    columns = weight.shape[1]
    order = torch.arange(columns) if order is None else order
    weight, hessian, drift = weight[:, order], hessian[order][:, order], drift[order][:, order]
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    forward = alpha * torch.triu(drift @ upper.T, diagonal=1) @ upper
    result = torch.empty_like(weight)
    for i in range(columns):
        column = weight[:, i].clone()
        quantized = quantize_column(column, int(order[i]))
        error = (column - quantized) / upper[i, i]
        for j in range(i + 1, columns):
            weight[:, j] += -error * upper[i, j] + column * forward[i, j]
        result[:, order[i]] = quantized
    return result
