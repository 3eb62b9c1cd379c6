"""Distil several teachers into one student through an information-bottleneck bridge, one-shot or over a sequence of tasks"""
__version__ = "0.1.0"

from importlib import import_module as _import_module

# The front door: a name and the module it is imported from when it is first used (PEP 562).
_WHERE = {
    'core.config': 'Config ConfigError DataError CheckpointError RunError AsibError resolve list_presets parameter_table',
    'core.runtime': 'RunContext When eval_mode',
    'data.datasets': 'register_dataset list_datasets create_data',
    'models.kdmodel': 'KDModel',
    'models.teachers': 'register_model create_teacher list_teachers',
    'models.students': 'create_student list_students',
    'freeze': 'apply_freeze freeze_report',
    'ib_mbm': 'IB_MBM Synergy average_logits',
    'distil.methods': 'Method register_method create_method weighted',
    'trainers.fit': 'fit',
    'trainers.loop': 'Callback Phase',
    'cl.methods': 'CLMethod register_cl_method list_cl_methods',
    'eval.deploy': 'load_student export_student',
    'analysis.tables': 'load_runs load_summary result_table',
    'analysis.compare': 'compare_runs',
    'analysis.report': 'save_report save_compare_report',
    'explore.opened': 'open_run',
    'explore.widgets': 'SynergyExplorer',
    'explore.screens': 'BottleneckExplorer CLExplorer RunBrowser',
    'explore.monitor': 'LiveMonitorCB',
    'run.experiment': 'run_experiment',
    'run.tasks': 'run_loop run_finetune run_evaluate compare_methods cl_compare demo_run',
    'run.bench': 'run_bench',
}
_HOME = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'asibkd' has no attribute '{name}'")
    value = getattr(_import_module(f'asibkd.{_HOME[name]}'), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
