"""Distil a large point-cloud network into one 40 times smaller, and see what it was worth.

    python examples/distill                                  # generated shapes, a few minutes
    python examples/distill --data modelnet40_ply_hdf5_2048  # or any layout in readers.py
    python examples/distill --data clouds.npz --loss fad kd fad+kd --points 1024 --epochs 200

Trains a teacher (or takes one, --teacher), the student alone and the student with each --loss,
then shows a table of parameters, accuracy and information lost. Everything lands in --output:
checkpoints, a log of every epoch (JSON lines), results.json and curves.png. Interrupted, the same
command goes on where it stopped and ends in the same result; what is finished is not trained again.

The three lines that matter to your own loop are in methods.py, the losses in terms.py.
"""
