import pytest

from screformer.train.distillation_arguments import StudentArguments, TeacherArguments


def test_a_new_student_is_tiny_unless_told_otherwise():
    assert StudentArguments().with_default_preset().preset == "tiny"
    assert StudentArguments(preset="base").with_default_preset().preset == "base"
    assert StudentArguments(checkpoint="small").with_default_preset().preset is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"teacher_weight": 1.5}, r"teacher_weight must be a share from 0 .* got 1.5"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherArguments(teacher="finetuned", **options)
