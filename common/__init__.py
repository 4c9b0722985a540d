"""What two or more sections of the paper share. Imports no section.

In the order in which one would read it:

    models         vit, mae
    images         fractals, files, images, data, augment, loader, workers, memory
    training       optim, training, watch, signals, checkpoint, probe, measures, distributed
    weights        pretrained (reads a file), shapes, filling (a model to train from it), rebuilding (its own model)
    command lines  ranges, options, entry, scripts, rows, tables, jobs
    results        runs, report, tensorboard, errors

A command line goes this way: `entry.run_script` parses it (`options.parse`: default, preset, recipe, typed), the
script's `main` settles what its weights say (`options.resolve`), opens its run (`runs.open_run`) and trains it
(`training.train`).
"""
