"""Optuna searches the learning rate and the number of experts of a configuration; each trial is a run of its own.

pip install optuna
python examples/optuna_search.py --trials 20
"""

import argparse

import optuna

import moesaic


def main(argv: list[str] | None = None) -> optuna.Study:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["configs/vision/digits.yaml"], help="later ones over earlier")
    parser.add_argument("--trials", type=int, default=20, help="runs")
    parser.add_argument("--output", default="runs/optuna", help="folder of the runs")
    args = parser.parse_args(argv)

    def objective(trial: optuna.Trial) -> float:
        tried = {
            "model.optimizer.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
            "model.moe.num_experts": trial.suggest_categorical("num_experts", [4, 8, 16]),
        }
        score = moesaic.fit(args.config, tried, run_dir=f"{args.output}/{trial.number}").best_score
        assert score is not None  # a run with validation has a best checkpoint
        return score

    study = optuna.create_study(direction="maximize")  # the digits' models are judged by val/top1
    study.optimize(objective, n_trials=args.trials)
    print(f"best: {study.best_value:.4f} of {study.best_params}, in {args.output}/{study.best_trial.number}")
    return study


if __name__ == "__main__":
    main()
