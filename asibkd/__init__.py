"""Distil several teachers into one student through an information-bottleneck bridge, one-shot or over a sequence of tasks"""
__version__ = "0.1.0"

from importlib import import_module as _import_module

# The front door: a name and the module it is imported from when it is first used (PEP 562).
_WHERE = {
    # run something
    'run.experiment': 'run_experiment',
    'run.tasks': 'run_finetune run_evaluate demo_run',
    'run.loops': 'run_loop compare_methods cl_compare',
    'run.sweeps': 'run_sweep',
    'run.bench': 'run_bench',
    'run.cite': 'cite',
    'run.reproduce': 'reproduce',
    # parameters and errors
    'core.params': 'Params param',
    'core.config': 'Config resolve list_presets parameter_table '
                   'AsibError ConfigError DataError CheckpointError RunError',
    # methods, teachers, students, data of your own
    'distil.methods': 'Method register_method check_method weighted',
    'trainers.build': 'create_method list_methods',   # there every method of the package is registered
    'cl.methods': 'CLMethod register_cl_method',
    'run.cl': 'list_cl_methods',                       # there every method of the package is registered
    'models.teachers': 'register_model create_teacher list_teachers',
    'models.students': 'create_student list_students',
    'models.kdmodel': 'KDModel',
    'data.check': 'check_data',
    'data.catalogue': 'register_dataset list_datasets',
    'data.datasets': 'create_data',
    'data.images': 'Data ImageSet',
    # the parts, for loops of your own
    'core.runtime': 'RunContext When eval_mode create_accelerator generator forked_rng seed_everything tau_at beta_at',
    'core.runfolder': 'Run',
    'freeze': 'apply_freeze freeze_report freeze_all',
    'ib_mbm': 'IB_MBM Synergy average_logits',
    'distil.losses': 'ce_loss kd_loss dkd_losses ib_kl feature_loss at_loss rkd_distance rkd_angle',
    'distil.metrics': 'accuracy collect_logits ece scores',
    'trainers.loop': 'Callback Phase',
    'trainers.fit': 'fit',
    'cl.streams': 'Stream create_stream',
    'cl.metrics': 'cl_metrics',
    # take the student away
    'eval.deploy': 'load_student',
    'run.export': 'export_student push_student',
    'eval.predict': 'predict_images',
    'eval.evaluate': 'verdict',
    # look at finished runs
    'analysis.tables': 'load_summary load_config load_metrics load_runs result_table show_table',
    'analysis.compare': 'collect compare_runs win_table ablation_table plot_compare save_compare',
    'analysis.figures': 'plot_curves',
    'analysis.cl': 'r_table explain_cl plot_R plot_forgetting plot_memory',
    'analysis.report': 'save_report save_compare_report',
    'analysis.result': 'RunResult',
    'explore.opened': 'open_run',
    'explore.widgets': 'SynergyExplorer',
    'explore.screens': 'BottleneckExplorer CLExplorer RunBrowser',
    'explore.monitor': 'LiveMonitorCB',
    'explore.serve': 'serve',
}
_HOME = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        from difflib import get_close_matches
        near = get_close_matches(name, _HOME, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ''
        raise AttributeError(f"module 'asibkd' has no attribute '{name}'.{hint}")
    value = getattr(_import_module(f'asibkd.{_HOME[name]}'), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
