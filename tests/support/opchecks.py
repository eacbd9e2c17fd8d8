"""What torch.library.opcheck does, with and without tracing the op, which takes nearly all of its time."""

from torch.library import opcheck

__all__ = ["registered"]

#: Schema, autograd registration, and that the fake has the shapes, dtypes and strides of the results.
WITHOUT_TRACING = ("test_schema", "test_autograd_registration", "test_faketensor")


def registered(op, operands, traced=True):
    """Check an op on these operands.

    Args:
        op: of torch.ops.
        operands: its arguments.
        traced: whether it is traced as well, with sizes that are symbols. Tracing runs the fake, which sees no more of
            a backend than its name: once for each size and way of use is enough.
    """
    opcheck(op, operands, **({} if traced else {"test_utils": WITHOUT_TRACING}))
